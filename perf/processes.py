"""Memory of the processes of a running server, as the system counts it."""

import contextlib
from pathlib import Path

from kvcast.server import TritonServer


def read_model_memory(server: TritonServer) -> dict[str, int]:
    """Return resident bytes by model: the Python-backend process of each, without shared memory and file pages."""
    found: dict[str, int] = {}
    group = server.pid if server.pid else 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) != group:
                continue
            arguments = (folder / "cmdline").read_text().split("\0")
            if "triton_python_backend_stub" in arguments[0]:
                model = Path(arguments[1]).parents[1].name  # …/<model>/<version>/model.py
                found[model] = found.get(model, 0) + read_anonymous_memory(folder)
    return found


def read_anonymous_memory(folder: Path) -> int:
    """Return the bytes of memory of its own that a process has touched."""
    for line in (folder / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return 1024 * int(value.split()[0])
    return 0
