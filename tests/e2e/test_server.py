"""The launcher: what it restricts, what it says when it cannot start, how fast and how cleanly it ends."""

import contextlib
import dataclasses
import http.client
import json
import logging
import os
import signal
import socket
import stat
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from kvcast.client import NO_RETRIES, RankerClient, RetryPolicy
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.tensors import MODELS
from kvcast.server import ServeConfig, ServerError, TritonServer, shared_memory
from kvcast.server.installation import find_installation
from tests.chaos.load import Load, draw_requests, expect, record_answers
from tests.conftest import make_settings
from tests.processes import find_children, is_running, list_shared_memory, read_state, read_until, run_serve, wait_until

STOP_BOUND_SECONDS = 5
RESTARTED_WITHIN_SECONDS = 30
ORPHANS_END_WITHIN_SECONDS = 10


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
    assert keep_alive.getresponse().read() == b'{"ready": true}'
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


def test_every_port_of_gateway_and_triton_is_bound_to_this_machine_only(server):
    listening = list_listening({server.pid, *find_children(os.getpid())})
    own = {server.settings.http_port, server.settings.grpc_port, server.settings.metrics_port}
    assert own < {port for _, port in listening}
    assert len(list_listening({server.pid})) >= 3, "Triton's own"
    assert {host for host, _ in listening} <= {"0100007F", "0000000000000000FFFF00000100007F"}, "127.0.0.1, also mapped"


def list_listening(pids: set[int]) -> set[tuple[str, int]]:
    """Return host (hex, as the kernel writes it) and port of each TCP socket that one of these processes listens on."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(link.readlink().name.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for _, address, _, state, *rest in map(str.split, Path("/proc/net", table).read_text().splitlines()[1:]):
            if state == "0A" and rest[5] in inodes:
                host, _, port = address.rpartition(":")
                found.add((host, int(port, 16)))
    return found


def ask(server: TritonServer, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(server.http_address)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def expect_refusal(settings: ServeConfig, *words: str) -> None:
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


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="make test-numpy2 runs it with numpy 2")
def test_numpy_2_is_refused_by_a_server_that_cannot_use_it(tiny_repository):
    expect_refusal(make_settings(tiny_repository), "2.51.0 needs numpy 1", np.__path__[0].rpartition("/")[0], "numpy<2")


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
    weights = own_repository / "user_encoder" / "1" / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1000])
    expect_refusal(make_settings(own_repository), "weights.data", "SHA-256")


def test_a_failing_start_leaves_nothing_behind(own_repository):
    regions = list_shared_memory()
    (own_repository / "doc_fusion" / "1" / "model.onnx").write_bytes(b"not onnx")
    before = find_children(os.getpid())
    expect_refusal(make_settings(own_repository), "SHA-256")
    assert find_children(os.getpid()) <= before
    assert list_shared_memory() <= regions


def is_ready(protocol: str, address: str) -> bool:
    try:
        if protocol == "http":
            with urllib.request.urlopen(f"http://{address}/v2/models/ranker/ready", timeout=5) as reply:
                return bool(json.load(reply)["ready"])
        with tritonclient.grpc.InferenceServerClient(address) as client:
            return bool(client.is_model_ready("ranker"))
    except (OSError, InferenceServerException):
        return False


def explain_refusal(protocol: str, address: str) -> str:
    """Return why a ranking is not answered, empty if it is."""
    try:
        with RankerClient(address, protocol=protocol, deadline=5.0, retry=NO_RETRIES) as client:
            client.rank([[1, 2]], [[1, 1, 1, 1]])
    except KvcastError as error:
        return str(error)
    return ""


def test_a_model_is_ready_only_when_its_inferences_are_accepted(tiny_repository):
    """Both protocols are asked side by side, from before anything listens until the server has started."""
    server, has_started = TritonServer(make_settings(tiny_repository)), threading.Event()
    seen: dict[str, list[tuple[bool, str]]] = {"grpc": [], "http": []}

    def ask_on() -> None:
        is_last = False
        while not is_last:
            is_last = has_started.is_set()
            for protocol, pairs in seen.items():
                address = getattr(server, f"{protocol}_address")
                pairs.append((is_ready(protocol, address), explain_refusal(protocol, address)))

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        with server:
            has_started.set()
            asking.join()
    finally:
        has_started.set()
        asking.join()
    for pairs in seen.values():
        assert [reason for ready, reason in pairs if ready and reason] == []
        assert any("the server is starting" in reason for _, reason in pairs)
        assert pairs[-1] == (True, "")


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
        assert Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")[0] == str(real.binary).encode()
        assert ask(server, "GET", "/v2/models/ranker/ready", {}) == 200


def test_a_tritonserver_on_path_serves_with_the_backends_beside_it(tiny_repository, tmp_path, monkeypatch):
    """As an installation under a prefix of its own: one of links to what the wheel has."""
    real = find_installation(tmp_path / "wheel")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").symlink_to(real.binary)
    (tmp_path / "backends").symlink_to(real.flags[0].partition("=")[2])
    monkeypatch.setenv("LD_LIBRARY_PATH", real.environment["LD_LIBRARY_PATH"])
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{real.environment['PATH']}")
    with TritonServer(make_settings(tiny_repository)) as server:
        command = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
        assert command[:2] == [str(tmp_path / "bin" / "tritonserver"), f"--backend-directory={tmp_path / 'backends'}"]
        with RankerClient(server.grpc_address) as client:
            assert len(client.rank([[1, 2]], [[1, 1, 1, 1]]).scores) == 1


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT], ids=lambda each: each.name)
def test_a_crash_is_followed_by_a_new_start_and_nobody_sees_it(tiny_repository, number):
    """The gateway keeps the ports and the requests, for clients that try again and for those that do not."""
    requests = draw_requests()
    with TritonServer(dataclasses.replace(make_settings(tiny_repository), models=["ranker"])) as server:
        expected = expect(requests, record_answers(server.grpc_address, requests))
        with (
            Load(server.grpc_address, expected, threads=2, retry=RetryPolicy()) as retrying,
            Load(server.grpc_address, expected, threads=2, retry=NO_RETRIES) as once,
            Load(server.http_address, expected, protocol="http", threads=2, retry=NO_RETRIES) as once_http,
        ):
            loads = (retrying, once, once_http)
            for load in loads:
                load.wait_for(10)
            crashed = server.pid
            os.kill(crashed, number)
            wait_until(lambda: server.pid != crashed and read_state(server)["restarts"] == 1, RESTARTED_WITHIN_SECONDS)
            for load in loads:
                load.wait_for(10)
        for load in loads:
            assert set(load.count()) == {"right"}, [each for each in load.outcomes if each.what != "right"][:5]
        assert not is_running(crashed)
        assert read_state(server)["is_ready"]


def test_a_shape_in_a_json_body_that_the_data_does_not_fill_is_refused_before_triton(server):
    before = server.pid
    wrong = {"name": "history", "shape": [1, 3, 2], "datatype": "INT64", "data": [1]}
    connection = http.client.HTTPConnection(server.http_address)
    connection.request("POST", "/v2/models/ranker/infer", json.dumps({"inputs": [wrong]}))
    response = connection.getresponse()
    error = json.load(response)["error"]
    connection.close()
    assert response.status == 400
    assert "expected 6 elements for its shape, got 1" in error
    assert server.pid == before
    assert is_running(before)


def test_a_server_whose_launcher_is_killed_ends_by_itself_and_its_memory_is_removed_at_the_next_start(
    tiny_repository, caplog
):
    regions = list_shared_memory()
    process = run_serve(tiny_repository)
    read_until(process, "Ctrl-C")
    started = find_children(process.pid)
    names = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in started)
    assert names.count(b"triton_python_backend_stub") == 2
    assert b"kvcast.gateway" in names
    own = list_shared_memory() - regions
    (owner,) = (path for path in own if path.name.endswith(shared_memory.OWNER))
    assert len(own) >= 3, "two stubs' and the owner's"
    process.kill()
    process.communicate(timeout=20)
    wait_until(lambda: not [pid for pid in started if is_running(pid)], ORPHANS_END_WITHIN_SECONDS)
    foreign = Path("/dev/shm", f"kvcast_{os.getpid()}_of_nobody_that_we_know")  # noqa: S108
    foreign.touch()
    caplog.set_level(logging.INFO, "kvcast")
    try:
        with TritonServer(make_settings(tiny_repository)) as server:
            assert not own & list_shared_memory()
            assert foreign.exists()
            with RankerClient(server.grpc_address) as client:
                assert len(client.rank([[1, 2]], [[1, 1, 1, 1]]).scores) == 1
    finally:
        foreign.unlink()
    instance = owner.name.removeprefix(shared_memory.PREFIX).removesuffix(shared_memory.OWNER)
    assert f"removed the shared memory of {instance}, a server that was killed" in caplog.messages


def test_the_next_start_leaves_the_memory_of_a_living_server_alone(server, tiny_repository):
    living = list_shared_memory()
    assert shared_memory.remove_leftovers() == []
    with TritonServer(dataclasses.replace(make_settings(tiny_repository), models=["ranker_resident"])):
        assert living <= list_shared_memory()
    assert living <= list_shared_memory()
    with RankerClient(server.grpc_address) as client:
        assert len(client.rank([[1, 2]], [[1, 1, 1, 1]]).scores) == 1
