"""What the processes of a running server use, as the system counts it: memory, file handles, threads."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from kvcast.server import TritonServer
from kvcast.server.stubs import list_stubs


@dataclass(frozen=True)
class ProcessUse:
    """What one process uses: bytes of its own, open file handles, threads."""

    memory_bytes: int
    files: int
    threads: int


def read_model_memory(server: TritonServer) -> dict[str, int]:
    """Return resident bytes by model: the Python-backend process of each, without shared memory and file pages."""
    found: dict[str, int] = {}
    for stub in list_stubs(server.pid).values():
        with contextlib.suppress(OSError):
            memory = read_anonymous_memory(Path(f"/proc/{stub.pid}"))
            found[stub.model] = found.get(stub.model, 0) + memory
    return found


def read_uses(server: TritonServer) -> dict[str, ProcessUse]:
    """Return what each process uses: tritonserver, the guard, and each model's (of several instances, one)."""
    pids = {"tritonserver": server.pid, "guard": server.guard_pid}
    pids |= {stub.model: stub.pid for stub in list_stubs(server.pid).values()}
    return {name: read_use(Path(f"/proc/{pid}")) for name, pid in pids.items()}


def read_use(folder: Path) -> ProcessUse:
    """Return what the process of a folder in `/proc` uses."""
    files, threads = (len(list((folder / kind).iterdir())) for kind in ("fd", "task"))
    return ProcessUse(read_anonymous_memory(folder), files, threads)


def read_shared_memory(server: TritonServer) -> int:
    """Return the bytes of the server's regions in shared memory."""
    return sum(512 * region.stat().st_blocks for region in server.list_shared_memory())


def read_anonymous_memory(folder: Path) -> int:
    """Return the bytes of memory of its own that a process has touched."""
    for line in (folder / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return 1024 * int(value.split()[0])
    return 0
