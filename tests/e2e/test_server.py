"""The launcher: what it restricts, what it says when it cannot start, how fast and how cleanly it ends."""

import dataclasses
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from kvcast.client import RankerClient
from kvcast.contract.tensors import MODELS
from kvcast.server import ServerError, ServerSettings, TritonServer
from kvcast.server.installation import find_installation
from tests.conftest import make_settings
from tests.support import find_free_ports

STOP_BOUND_SECONDS = 5


def run_serve(repository: Path, *arguments: str) -> subprocess.Popen[str]:
    http_port, grpc_port, metrics_port = find_free_ports(3)
    ports = ["--http-port", str(http_port), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    command = [sys.executable, "-m", "kvcast.server", "--repository", str(repository), *ports, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the server ended without saying {words!r}")


def find_children(pid: int) -> set[int]:
    """Return all descendants of a process."""
    found: set[int] = set()
    todo = [pid]
    while todo:
        for path in Path("/proc").glob(f"{todo.pop()}/task/*/children"):
            children = {int(child) for child in path.read_text().split()}
            todo += children - found
            found |= children
    return found


def list_shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())  # noqa: S108 where Triton keeps its regions


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended (one that waits to be collected has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_idle_server_and_everything_of_it(tiny_repository, number):
    regions = list_shared_memory()
    process = run_serve(tiny_repository)
    address = read_until(process, "  HTTP").split("//")[1].strip()
    read_until(process, "Ctrl-C")
    started = find_children(process.pid)
    assert len(started) >= 3, "tritonserver and two stubs"
    keep_alive = http.client.HTTPConnection(address)  # an idle connection must not hold the shutdown for long
    keep_alive.request("GET", "/v2/health/ready")
    assert keep_alive.getresponse().read() == b""
    asked = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=20)
    seconds = time.monotonic() - asked
    keep_alive.close()
    assert process.returncode == 0
    assert seconds < STOP_BOUND_SECONDS
    assert not [pid for pid in started if is_running(pid)]
    assert list_shared_memory() <= regions


def test_a_second_signal_does_not_interrupt_the_clean_up(tiny_repository):
    process = run_serve(tiny_repository)
    read_until(process, "Ctrl-C")
    started = find_children(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert not [pid for pid in started if is_running(pid)]


def test_the_admin_key_opens_what_is_restricted_and_only_its_owner_reads_it(server):
    key_file = server.admin_key_file
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert key_file.read_text().strip() in server.admin_headers.values()
    for path in ("/v2/repository/index", "/v2/repository/models/ranker/unload", "/v2/systemsharedmemory/status"):
        assert ask(server, "POST" if "repository" in path else "GET", path, {}) == 403
    assert ask(server, "POST", "/v2/repository/index", server.admin_headers) == 200
    client = tritonclient.grpc.InferenceServerClient(server.grpc_address)
    for call in (client.get_model_repository_index, client.get_log_settings, client.get_trace_settings):
        with pytest.raises(InferenceServerException, match="restricted"):
            call()
    with pytest.raises(InferenceServerException, match="restricted"):
        client.get_system_shared_memory_status()
    headers = {f"triton-grpc-protocol-{name}": value for name, value in server.admin_headers.items()}
    assert len(client.get_model_repository_index(headers=headers).models) == len(MODELS)
    client.close()


def test_the_two_apis_without_inference_stay_open(server):
    assert ask(server, "GET", "/v2/health/live", {}) == 200
    assert ask(server, "GET", "/v2/models/ranker/config", {}) == 200


def test_it_binds_to_this_machine_only(server):
    entries = [
        entry.split() for table in ("tcp", "tcp6") for entry in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    listening = [address.split(":") for _, address, _, state, *_ in entries if state == "0A"]
    for port in (server.settings.http_port, server.settings.grpc_port, server.settings.metrics_port):
        hosts = [host for host, listening_port in listening if int(listening_port, 16) == port]
        assert hosts
        assert all(host.endswith("0100007F") for host in hosts), "127.0.0.1, possibly mapped into IPv6"


def ask(server: TritonServer, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(server.http_address)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def expect_refusal(settings: ServerSettings, *words: str) -> None:
    with pytest.raises(ServerError) as caught, TritonServer(settings):
        pytest.fail("it started")
    for word in words:
        assert word in str(caught.value)


def test_a_missing_export_is_one_sentence(tmp_path):
    expect_refusal(make_settings(tmp_path), "no exported user_encoder", "make export")


def test_another_configuration_is_one_sentence(tiny_repository):
    settings = dataclasses.replace(make_settings(tiny_repository), config="bench")
    expect_refusal(settings, "'tiny'", "'bench'", "make export CONFIG=bench")


def test_an_unknown_model_is_one_sentence(tiny_repository):
    settings = dataclasses.replace(make_settings(tiny_repository), models=["rankr"])
    expect_refusal(settings, "rankr", "ranker_full")


@pytest.mark.parametrize("variable", ["HTTP_PORT", "GRPC_PORT", "METRICS_PORT"])
def test_a_port_in_use_is_one_sentence(tiny_repository, variable):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = dataclasses.replace(make_settings(tiny_repository), **{variable.lower(): port})
        expect_refusal(settings, f"port {port}", "in use", variable)


def test_a_swapped_graph_is_refused_at_load(own_repository):
    fusion, full = (own_repository / model / "1" / "model.onnx" for model in ("doc_fusion", "ranker_full"))
    fusion.write_bytes(full.read_bytes())
    expect_refusal(make_settings(own_repository), "doc_fusion/1/model.onnx", "SHA-256", "export again")


def test_a_truncated_weights_file_is_refused_at_load(own_repository):
    weights = own_repository / "user_encoder" / "1" / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1000])
    expect_refusal(make_settings(own_repository), "model.onnx.data", "SHA-256")


def test_a_failing_start_leaves_nothing_behind(own_repository):
    regions = list_shared_memory()
    (own_repository / "doc_fusion" / "1" / "model.onnx").write_bytes(b"not onnx")
    before = find_children(os.getpid())
    expect_refusal(make_settings(own_repository), "SHA-256")
    assert find_children(os.getpid()) <= before
    assert list_shared_memory() <= regions


def test_a_tritonserver_on_path_is_used_as_it_is(tiny_repository, tmp_path, monkeypatch):
    """As in the NGC image: here a script that says so and ends."""
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\necho 'error: this is the one on PATH' >&2\nexit 3\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    expect_refusal(make_settings(tiny_repository), "this is the one on PATH")


def test_a_real_tritonserver_on_path_serves_too(tiny_repository, tmp_path, monkeypatch):
    """As in the NGC image, whose server needs nothing from us: here a script that brings what the wheel's needs."""
    real = find_installation(tmp_path / "wheel")
    binary = tmp_path / "tritonserver"
    variables = " ".join(f"{name}='{value}'" for name, value in real.environment.items())
    binary.write_text(f'#!/bin/sh\nexec env {variables} {real.binary} {" ".join(real.flags)} "$@"\n')
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with TritonServer(make_settings(tiny_repository)) as server:
        assert server.process is not None
        assert server.process.args[0] == str(binary)
        assert ask(server, "GET", "/v2/models/ranker/ready", {}) == 200


def test_a_crash_is_followed_by_a_new_start(tiny_repository):
    """An absurd shape in a JSON body crashes Triton 2.51 itself; the next valid request is answered again."""
    process = run_serve(tiny_repository)
    address = read_until(process, "  HTTP").split("//")[1].strip()
    read_until(process, "Ctrl-C")
    absurd = {"name": "history", "shape": [1, 2**40, 2], "datatype": "INT64", "data": [1]}
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/v2/models/ranker/infer", json.dumps({"inputs": [absurd]}))
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()
    assert "SIGABRT" in read_until(process, "starting it again")
    read_until(process, "Ctrl-C")
    with RankerClient(address, protocol="http") as client:
        assert len(client.rank([[1, 2]], [[1, 1, 1, 1]]).scores) == 1
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0
