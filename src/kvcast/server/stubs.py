"""The processes that Triton starts for the models: one stub a model instance.

Triton does not restart a stub that has died (github.com/triton-inference-server/server/issues/8604), and reports it
only since 26.03: before that, readiness stays true. So the supervisor looks itself.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvcast.server.installation import STUB, ServerError

# pybind11 2.12 in the Python backend: github.com/triton-inference-server/python_backend/pull/384.
NUMPY_2_SINCE = (2, 52)
# numpy 1 has its extension modules in numpy/core.
NUMPY_2 = re.compile(r"(/.+)/numpy/_core/")


@dataclass(frozen=True)
class Stub:
    """One stub: its process, the model and version that it runs, and whether it is held (SIGSTOP, a debugger)."""

    pid: int
    model: str
    version: int
    is_stopped: bool


def list_stubs(server: int) -> dict[int, Stub]:
    """Return the living stubs that are children of a tritonserver process, by process id."""
    found = {}
    for pid in _list_children(server):
        with contextlib.suppress(psutil.Error, ValueError):  # it has ended, or is no stub
            process = psutil.Process(pid)
            program, model_file, *_ = process.cmdline()  # …/<model>/<version>/model.py; a zombie has none
            if Path(program).name == STUB:
                version, model = Path(model_file).parts[-2:-4:-1]
                stopped = process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
                found[pid] = Stub(pid, model, int(version), stopped)
    return found


def check_numpy(version: tuple[int, ...], stubs: Iterable[int]) -> None:
    """Check that the Python backend works with the numpy that its stubs have loaded.

    version: Triton's. stubs: their process ids.

    Raises:
        ServerError: it does not: with numpy 2 Triton 2.51 garbles what goes in, and nothing comes out.
    """
    for pid in stubs if version < NUMPY_2_SINCE else ():
        with contextlib.suppress(OSError):  # it has ended
            found = NUMPY_2.search(Path(f"/proc/{pid}/maps").read_text())
            if found:
                raise ServerError(
                    f"tritonserver {'.'.join(map(str, version))} needs numpy 1 in its models, and they load numpy 2 "
                    f"from {found[1]}: run `pip install 'numpy<2'` in that environment, or use Triton 2.52 or newer"
                )


def _list_children(pid: int) -> Iterator[int]:
    """Return the ids of a process's children; psutil's `children` reads all of /proc, 9 ms instead of 0.5 ms."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, path.read_text().split())
