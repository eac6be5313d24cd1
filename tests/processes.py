"""Servers as processes: started with the command, watched, looked at from outside."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from kvcast.server import TritonServer
from kvcast.server.repository import find_free_ports


def run_serve(repository: Path, *arguments: str) -> subprocess.Popen[str]:
    """Run `kvcast serve` on free ports."""
    http_port, grpc_port, metrics_port = find_free_ports(3)
    ports = ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    command = [sys.executable, "-m", "kvcast.server", "--repository", str(repository), *ports, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Read its output up to a line with these words; return that."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the server ended without saying {words!r}")


def read_state(server: TritonServer) -> dict[str, Any]:
    """Return the state of the server as the launcher publishes it."""
    with urllib.request.urlopen(f"http://{server.http_address}/kvcast/state", timeout=5) as reply:
        state: dict[str, Any] = json.load(reply)
        return state


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for something that must happen within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def find_children(pid: int) -> set[int]:
    """Return all descendants of a process."""
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def list_shared_memory() -> set[Path]:
    """Return all that lies in shared memory."""
    return set(Path("/dev/shm").iterdir())  # noqa: S108 where Triton keeps its regions
