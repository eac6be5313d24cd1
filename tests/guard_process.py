"""A guard as a process of its own, as a launcher starts it, and what tests want to know of processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcast.gateway.state import State
from kvcast.server.repository import find_free_ports

READY = State(is_ready=True, reason="", release=1)
FOLLOWED_WITHIN_SECONDS = 10


@dataclass
class Guard:
    """A running guard, and where it listens."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    metrics: str
    state_file: Path

    def tell(self, state: State) -> None:
        """Write the state file as the launcher does, and wait until the gateway has read it."""
        state.write(self.state_file)
        expected = json.loads(self.state_file.read_text())
        deadline = time.monotonic() + FOLLOWED_WITHIN_SECONDS
        while self.read_state() != expected:
            assert time.monotonic() < deadline, "the guard does not follow its state file"
            time.sleep(0.01)

    def read_state(self) -> object:
        with urllib.request.urlopen(f"http://{self.http}/kvcast/state", timeout=5) as reply:
            return json.load(reply)


def make_addresses(http: str = "", grpc: str = "") -> list[str]:
    """Return options: free addresses, and upstreams; nothing listens at those not given."""
    ports = find_free_ports(6)
    upstreams = {"http": http, "grpc": grpc, "metrics": ""}
    options = []
    for name, own, other in zip(upstreams, ports[:3], ports[3:], strict=True):
        options += [f"--{name}", f"127.0.0.1:{own}", f"--upstream-{name}", upstreams[name] or f"127.0.0.1:{other}"]
    return options


@contextlib.contextmanager
def run_guard(
    *arguments: str,
    http: str = "",
    grpc: str = "",
    state: State | None = READY,
    environment: dict[str, str] | None = None,
) -> Iterator[Guard]:
    """Start a guard before the upstreams `http` and `grpc`; give it once it listens and has heard `state`."""
    addresses = make_addresses(http, grpc)
    with tempfile.TemporaryDirectory() as folder:
        state_file = Path(folder) / "state.json"
        command = [sys.executable, "-m", "kvcast.gateway", *addresses, "--state", str(state_file), *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        try:
            guard = Guard(process, addresses[1], addresses[5], addresses[9], state_file)
            assert process.stdout is not None
            assert process.stdout.readline().startswith("kvcast guard: listening")
            if state is not None:
                guard.tell(state)
            yield guard
        finally:
            process.kill()
            process.communicate()
