"""The guard before a real tritonserver: the same answers, refusals instead of crashes, a quick and clean end."""

import gzip
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from kvcast.clicklog import ClickLog
from kvcast.contract.config import load_config
from kvcast.server import TritonServer
from tests.guard_process import is_running, list_running_descendants, run_guard
from tests.support import TOLERANCE, find_free_ports

REQUEST = ClickLog(load_config("tiny").schema, seed=5).draw_request(30, 6)
TENSORS = {"history": REQUEST.history[None], "candidates": REQUEST.candidates[None]}
INFER = "/v2/models/ranker/infer"
STOP_BOUND_SECONDS = 2
Reply = tuple[int, dict[str, str], Any]


@pytest.fixture(scope="module")
def guarded(server: TritonServer) -> Iterator[str]:
    """The address of a guard before the session's server."""
    with run_guard(server.http_address) as (_, address):
        yield address


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> np.ndarray:
    """Scores, over gRPC, where no guard is."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc_address)
    inputs = [tritonclient.grpc.InferInput(name, list(array.shape), "INT64") for name, array in TENSORS.items()]
    for entry, array in zip(inputs, TENSORS.values(), strict=True):
        entry.set_data_from_numpy(array)
    scores: np.ndarray = client.infer("ranker", inputs).as_numpy("scores")
    client.close()
    return scores


def write_json(**changes: Any) -> bytes:
    inputs = [
        {"name": name, "shape": list(array.shape), "datatype": "INT64", "data": array.tolist()}
        for name, array in TENSORS.items()
    ]
    return json.dumps({"inputs": inputs, **changes}).encode()


def write_binary() -> tuple[bytes, dict[str, str]]:
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "INT64",
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in TENSORS.items()
    ]
    outputs = [{"name": "scores", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    data = b"".join(array.tobytes() for array in TENSORS.values())
    return header + data, {"Inference-Header-Content-Length": str(len(header))}


def ask(
    address: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str = ""
) -> Reply:
    """Return status, headers and body, JSON read."""
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    found = {name.lower(): value for name, value in response.getheaders()}
    return response.status, found, json.loads(content) if content.startswith((b"{", b"[")) else content


def read_scores(reply: Reply) -> np.ndarray:
    status, _, table = reply
    assert status == 200, table
    output = next(each for each in table["outputs"] if each["name"] == "scores")
    return np.array(output["data"], np.float32).reshape(output["shape"])


def test_json_compressed_or_not_gets_the_scores_that_grpc_gets(guarded, expected):
    body = write_json()
    for reply in (
        ask(guarded, INFER, body),
        ask(guarded, "/v2/models/ranker/versions/1/infer", body),
        ask(guarded, INFER, gzip.compress(body), {"Content-Encoding": "gzip"}),
    ):
        np.testing.assert_allclose(read_scores(reply), expected, rtol=0, atol=TOLERANCE)


def test_binary_data_goes_both_ways(guarded, expected):
    body, headers = write_binary()
    connection = http.client.HTTPConnection(guarded)
    connection.request("POST", INFER, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    length = int(response.headers["Inference-Header-Content-Length"])
    scores = np.frombuffer(content[length:], np.float32)
    np.testing.assert_allclose(scores[None], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_works_through_it(guarded, expected, compression):
    client = tritonclient.http.InferenceServerClient(guarded)
    inputs = [tritonclient.http.InferInput(name, list(array.shape), "INT64") for name, array in TENSORS.items()]
    for entry, array in zip(inputs, TENSORS.values(), strict=True):
        entry.set_data_from_numpy(array)
    result = client.infer(
        "ranker", inputs, request_compression_algorithm=compression, response_compression_algorithm=compression
    )
    np.testing.assert_allclose(result.as_numpy("scores"), expected, rtol=0, atol=TOLERANCE)
    assert client.is_server_ready()
    assert client.get_model_metadata("ranker")["name"] == "ranker"
    client.close()


def test_large_replies_stream_through(server, guarded):
    """User KV as JSON is larger than what is sent in one piece."""
    history = np.ones((8, 96, 2), np.int64)
    entry = {"name": "history", "shape": [8, 96, 2], "datatype": "INT64", "data": history.ravel().tolist()}
    body = json.dumps({"inputs": [entry]}).encode()
    through = ask(guarded, "/v2/models/user_encoder/infer", body)
    direct = ask(server.http_address, "/v2/models/user_encoder/infer", body)
    assert int(through[1]["content-length"]) > 1 << 20
    assert through[2] == direct[2]


def test_an_absurd_shape_is_refused_and_the_server_lives(server, guarded, expected):
    running = list_running_descendants(server.process.pid)
    entry = {"name": "history", "shape": [1, 1 << 40, 2], "datatype": "INT64", "data": [1]}
    status, _, table = ask(guarded, INFER, json.dumps({"inputs": [entry]}).encode())
    assert status == 400
    assert "1099511627776" in table["error"]
    assert list_running_descendants(server.process.pid) == running
    np.testing.assert_allclose(read_scores(ask(guarded, INFER, write_json())), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("body", [b"", b"garbage", b"[]", b'{"inputs":[],"inputs":[]}', b"[" * 100_000, b"\xff"])
def test_malformed_json_is_the_callers_mistake(guarded, body):
    status, headers, table = ask(guarded, INFER, body)
    assert status == 400
    assert headers["content-type"].startswith("application/json")
    assert list(table) == ["error"]


@pytest.mark.parametrize("length", ["-1", "x", "99999", "1", "0"])
def test_a_wrong_header_length_is_the_callers_mistake(guarded, length):
    body, _ = write_binary()
    assert ask(guarded, INFER, body, {"Inference-Header-Content-Length": length})[0] == 400


def test_a_body_over_the_limit_is_refused_compressed_or_not(server):
    with run_guard(server.http_address, "--max-body-bytes", "100000") as (_, address):
        bomb = gzip.compress(bytes(50 << 20))
        assert len(bomb) < 100_000
        assert ask(address, INFER, bomb, {"Content-Encoding": "gzip"})[0] == 413
        assert ask(address, INFER, bytes(100_001))[0] == 413
        assert ask(address, INFER, write_json())[0] == 200


def test_other_paths_and_methods(guarded):
    for path in ("/", "/v2/models/ranker/generate", "/v2/models/ranker/generate_stream", "/v2/x", "/v2/models/%2e%2e"):
        assert ask(guarded, path, b"{}")[0] == 404
    assert ask(guarded, INFER)[0] == 405
    assert ask(guarded, "/v2/health/ready", b"")[0] == 405
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/ranker/config", "/v2/models/ranker/stats"):
        assert ask(guarded, path)[0] == 200


def test_the_admin_key_is_still_asked_for(server, guarded):
    assert ask(guarded, "/v2/repository/index", b"")[0] == 403
    status, _, models = ask(guarded, "/v2/repository/index", b"", server.admin_headers)
    assert status == 200
    assert "ranker" in [model["name"] for model in models]


def test_readiness_is_the_servers_and_the_state_files(server, tmp_path):
    state = tmp_path / "state.json"
    with run_guard(server.http_address, "--state", str(state)) as (_, address):
        assert ask(address, "/v2/health/ready")[0] == 200
        write_state(state, ready=False, reason="ranker has been replaced 3 times")
        status, _, table = ask(address, "/v2/health/ready")
        assert status == 503
        assert table == {"error": "ranker has been replaced 3 times"}
        assert ask(address, "/kvcast/state")[2]["ready"] is False
        assert ask(address, INFER, write_json())[0] == 200, "another instance may answer"
        state.write_text("{")
        assert ask(address, "/v2/health/ready")[0] == 503, "half a file changes nothing"
        write_state(state, ready=True)
        assert ask(address, "/v2/health/ready")[0] == 200
        write_state(state, ready=True, draining=True)
        status, headers, table = ask(address, INFER, write_json())
        assert (status, headers["connection"]) == (503, "close")
        assert table == {"error": "server is stopping; try again elsewhere"}
        assert ask(address, "/v2/health/ready")[0] == 503
        state.unlink()
        assert ask(address, "/v2/health/ready")[0] == 200


def write_state(path: Path, **state: Any) -> None:
    """Write it in one step, as a supervisor should."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(state))
    new.replace(path)


def test_no_server_is_503():
    with run_guard(f"127.0.0.1:{find_free_ports(1)[0]}") as (_, address):
        for reply in (ask(address, INFER, write_json()), ask(address, "/v2/health/ready"), ask(address, "/v2")):
            assert reply[0] == 503
            assert reply[2] == {"error": "server is starting or stopping; try again"}


def test_idle_connections_do_not_hold_the_end(server):
    with run_guard(server.http_address) as (process, address):
        host, port = address.split(":")
        silent = socket.create_connection((host, int(port)))
        idle = http.client.HTTPConnection(address)
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - asked < STOP_BOUND_SECONDS
        silent.close()
        idle.close()


class Upstream:
    """A server that answers as told, to see what the guard makes of it."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.received += connection.recv(1 << 16)
                self._answer(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def reply_with(status: str, body: bytes, delay: float = 0) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        time.sleep(delay)
        connection.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body)) + body)

    return answer


@pytest.mark.parametrize(
    ("status", "message", "expected_status", "words"),
    [
        (
            "500 x",
            "in ensemble 'ranker', Stub process 'user_encoder_0_0' is not healthy.",
            503,
            "user_encoder is being",
        ),
        ("500 x", "failed to parse the request JSON buffer: x", 400, "failed to parse"),
        ("500 x", 'Traceback: File "/srv/a/model.py", line 3', 500, "reference"),
        ("400 x", "cannot open /srv/models/ranker/1", 400, "reference"),
        ("400 x", "expected shape [1, 2]", 400, "expected shape [1, 2]"),
        ("503 x", "Exceeds maximum queue size", 503, "Exceeds"),
    ],
)
def test_what_becomes_of_the_servers_errors(status, message, expected_status, words):
    upstream = Upstream(reply_with(status, json.dumps({"error": message}).encode()))
    with run_guard(upstream.address) as (_, address):
        got_status, _, table = ask(address, INFER, write_json())
    upstream.close()
    assert got_status == expected_status
    assert words in table["error"]
    assert "/srv" not in table["error"]


def test_the_upstream_gets_its_own_header_and_the_callers_none():
    upstream = Upstream(reply_with("200 x", b"{}"))
    with run_guard(upstream.address, environment={"KVCAST_GUARD_HEADER": "guard-key=a=b"}) as (_, address):
        assert ask(address, INFER, write_json(), {"guard-key": "mine", "X-Own": "1", "traceparent": "t"})[0] == 200
    upstream.close()
    head = upstream.received.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    assert b"guard-key: a=b" in head
    assert b"traceparent: t" in head
    assert not [line for line in head if b"mine" in line or b"x-own" in line]


def test_a_request_in_flight_is_answered_before_the_end():
    upstream = Upstream(reply_with("200 x", b'{"late": true}', delay=1.0))
    with run_guard(upstream.address) as (process, address):
        replies: list[Reply] = []
        asking = threading.Thread(target=lambda: replies.append(ask(address, INFER, write_json())))
        asking.start()
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(ConnectionRefusedError):
            ask(address, "/v2")
        assert process.wait(10) == 0
        asking.join()
    upstream.close()
    assert replies[0][0] == 200
    assert replies[0][1]["connection"] == "close"


def test_an_answer_that_breaks_off_is_not_continued_with_another():
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 x\r\nContent-Length: 5000000\r\n\r\n" + bytes(2_000_000))

    upstream = Upstream(answer)
    with run_guard(upstream.address) as (_, address):
        connection = http.client.HTTPConnection(address, timeout=10)
        connection.request("POST", INFER, write_json())
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)) as caught:
            connection.getresponse().read()
        assert b"error" not in getattr(caught.value, "partial", b"")
        connection.close()
    upstream.close()


def test_the_drain_is_bounded():
    upstream = Upstream(reply_with("200 x", b"{}", delay=3))
    with run_guard(upstream.address, "--drain-seconds", "0.3") as (process, address):
        connection = http.client.HTTPConnection(address)
        connection.request("POST", INFER, write_json())
        time.sleep(0.3)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - asked < STOP_BOUND_SECONDS
        connection.close()
    upstream.close()


def test_a_caller_who_goes_away_takes_the_question_along():
    gone = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.settimeout(10)
        if connection.recv(1) == b"":
            gone.set()

    upstream = Upstream(answer)
    with run_guard(upstream.address) as (_, address):
        connection = http.client.HTTPConnection(address)
        connection.request("POST", INFER, write_json())
        time.sleep(0.3)
        connection.close()
        assert gone.wait(5)
    upstream.close()


def test_it_ends_with_the_process_that_started_it(server):
    port = find_free_ports(1)[0]
    command = ["-m", "kvcast.server.guard", "--listen", f"127.0.0.1:{port}", "--upstream", server.http_address]
    code = (
        "import subprocess, sys, time\n"
        f"guard = subprocess.Popen([sys.executable, *{command!r}], stdout=subprocess.PIPE)\n"
        "guard.stdout.readline()\nprint(guard.pid, flush=True)\ntime.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    assert is_running(pid)
    starter.kill()
    starter.communicate()
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


@pytest.mark.parametrize(
    "arguments", [["--listen", "x", "--upstream", "127.0.0.1:1"], ["--listen", "127.0.0.1:1", "--upstream", ":x"]]
)
def test_a_wrong_address_is_one_sentence(arguments):
    ended = subprocess.run(
        [sys.executable, "-m", "kvcast.server.guard", *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert ended.returncode == 2
    assert "expected HOST:PORT" in ended.stderr
