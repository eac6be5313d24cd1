"""A guard as a process of its own, as a launcher starts it, and what tests want to know of processes."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from kvcast.server.repository import find_free_ports


@contextlib.contextmanager
def run_guard(
    upstream: str, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a guard before `upstream`; give its process and its address once it listens."""
    address = f"127.0.0.1:{find_free_ports(1)[0]}"
    command = [sys.executable, "-m", "kvcast.server.guard", "--listen", address, "--upstream", upstream, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"kvcast guard: listening on {address}\n"
        yield process, address
    finally:
        process.kill()
        process.communicate()


def list_running_descendants(pid: int) -> set[int]:
    """Return all descendants of a process that have not ended."""
    found: set[int] = set()
    todo = [pid]
    while todo:
        for path in Path("/proc").glob(f"{todo.pop()}/task/*/children"):
            children = {int(child) for child in path.read_text().split()}
            todo += children - found
            found |= children
    return {each for each in found if is_running(each)}


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended (one that waits to be collected has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
