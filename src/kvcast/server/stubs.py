"""The processes that Triton starts for the models, as the kernel shows them: one stub a model instance.

Triton never restarts a stub that has died, and goes on to call itself ready; so somebody has to look.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcast.server.installation import STUB

# States of a process that will do no more, and of one that is held (SIGSTOP, a debugger).
ENDED = frozenset("ZXx")
STOPPED = frozenset("Tt")


@dataclass(frozen=True)
class Stub:
    """One stub: its process, the model and version that it runs, and the kernel's letter for its state."""

    pid: int
    model: str
    version: int
    state: str


def list_stubs(server: int) -> dict[int, Stub]:
    """Return the stubs that are children of a tritonserver process, by process id; those that have ended are not."""
    found = {}
    for pid in _list_children(server):
        with contextlib.suppress(OSError, ValueError, IndexError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if Path(command[0].decode()).name == STUB and state not in ENDED:
                version, model = Path(command[1].decode()).parts[-2:-4:-1]  # …/<model>/<version>/model.py
                found[pid] = Stub(pid, model, int(version), state)
    return found


def _list_children(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, path.read_text().split())
