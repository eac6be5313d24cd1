"""`kvcast probe` against a running server, and none."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from kvcast.client.probe import Health, Probe, main
from kvcast.server import TritonServer
from kvcast.server.stubs import list_stubs
from tests.support import find_free_ports


def address_of(server: TritonServer, protocol: str) -> str:
    return server.grpc_address if protocol == "grpc" else server.http_address


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("model", ["ranker", "ranker_resident", "ranker_full"])
def test_a_server_that_ranks_is_ready(server, capsys, protocol, model):
    address = address_of(server, protocol)
    assert main(["--address", address, "--protocol", protocol, "--model", model]) == 0
    assert capsys.readouterr().out.startswith(f"ready: {model} at {address} ({protocol}), release ")
    assert main(["--address", address, "--protocol", protocol, "--model", model, "--live", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is True
    assert len(printed["release"]) == 64


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_model_that_is_not_served_is_the_operators(server, capsys, protocol):
    arguments = ["--address", address_of(server, protocol), "--protocol", protocol, "--model", "other"]
    assert main(arguments) == 4
    assert "MODELS" in capsys.readouterr().err


def test_waiting_for_a_server_that_never_comes():
    address = f"127.0.0.1:{find_free_ports(1)[0]}"
    command = [sys.executable, "-m", "kvcast", "probe", "--address", address, "--wait", "1"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(f"not ready: ranker at {address} (grpc): no server")
    assert done.stdout == ""
    assert 0.5 < time.monotonic() - started < 30


def test_it_runs_as_a_module_too(server):
    command = [sys.executable, "-m", "kvcast.client.probe", "--address", server.grpc_address, "--wait", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ready: ranker at ")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_model_that_hangs_is_neither_ready_nor_live(server, protocol):
    """Where Triton's own endpoints would say ready: the process is there, and answers nothing."""
    stub = next(each.pid for each in list_stubs(server.pid).values() if each.model == "ranker_full")
    probe = Probe(address_of(server, protocol), protocol, "ranker_full", deadline=1)
    os.kill(stub, signal.SIGSTOP)
    try:
        finding = probe.run()
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have been ended, and replaced
            os.kill(stub, signal.SIGCONT)
        time.sleep(0.5)  # for the supervisor to see that it goes on, before somebody stops it again
    assert finding.health is Health.NOT_READY
    assert re.search(r"no answer within 1 s|not answered within|being replaced", finding.why), finding.why
    assert finding.health.to_status(live=True) == 3
    assert probe.run_until_ready(20).health is Health.READY
