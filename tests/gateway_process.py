"""A gateway as a process of its own, as a launcher starts it."""

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvcast.gateway.config import Event, GatewayConfig, ServeConfig, State, decode_line, encode_line
from kvcast.server.repository import find_free_ports

READY = State(is_ready=True, reason="", release_number=1)
FOLLOWED_WITHIN_SECONDS = 10


@dataclass
class Gateway:
    """A running gateway, and where it listens."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    metrics: str
    control: socket.socket

    def tell(self, state: State) -> None:
        """Be its launcher: say something, and wait until it has been heard."""
        self.control.sendall(encode_line(state))
        expected = json.loads(encode_line(state))
        deadline = time.monotonic() + FOLLOWED_WITHIN_SECONDS
        while self.read_state() != expected:
            assert time.monotonic() < deadline, "the gateway does not follow its launcher"
            time.sleep(0.01)

    def read_state(self) -> object:
        with urllib.request.urlopen(f"http://{self.http}/kvcast/state", timeout=5) as reply:
            return json.load(reply)


def make_config(http: str = "", grpc: str = "", **changes: Any) -> GatewayConfig:
    """Return a configuration with free ports of its own; upstreams `host:port` that are not given have nobody."""
    ports = find_free_ports(6)
    serve = dataclasses.replace(ServeConfig(http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2]), **changes)
    upstreams = [
        int(each.rpartition(":")[2]) if each else port for each, port in zip((http, grpc, ""), ports[3:], strict=True)
    ]
    return GatewayConfig(serve, *upstreams)


def start_gateway(config: GatewayConfig, **options: Any) -> tuple[subprocess.Popen[str], socket.socket]:
    """Start a gateway; return it and the launcher's end of its socket."""
    own, other = socket.socketpair()
    with other:
        command = [sys.executable, "-m", "kvcast.gateway", str(other.fileno())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[other.fileno()], **options)
    own.sendall(encode_line(config))
    return process, own


@contextlib.contextmanager
def run_gateway(http: str = "", grpc: str = "", state: State | None = READY, **changes: Any) -> Iterator[Gateway]:
    """Start a gateway before the upstreams `http` and `grpc`; give it once it listens and has heard `state`.

    Args:
        http: Triton's `host:port`, empty for an address where nothing listens.
        grpc: likewise.
        state: what it is told first.
        changes: fields of `ServeConfig`.
    """
    config = make_config(http, grpc, **changes)
    process, control = start_gateway(config)
    try:
        assert decode_line(control.makefile("rb").readline(), Event) == Event.LISTENING
        serve = config.serve
        addresses = (f"{serve.host}:{port}" for port in (serve.http_port, serve.grpc_port, serve.metrics_port))
        gateway = Gateway(process, *addresses, control)
        if state is not None:
            gateway.tell(state)
        yield gateway
    finally:
        process.kill()
        process.communicate()
        control.close()
