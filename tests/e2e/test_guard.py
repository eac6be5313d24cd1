"""The guard's HTTP side: the same answers as before, refusals, a quick and clean end.

Most of it asks the session's server, which has its guard; some put a guard before an upstream that answers as told.
"""

import contextlib
import dataclasses
import gzip
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from kvcast.gateway.metrics import ASK_SECONDS
from kvcast.protocol.config import load_config
from kvcast.server import TritonServer
from kvcast.synthetic import ClickLog
from tests.guard_process import READY, make_addresses, run_guard
from tests.processes import find_children, is_running
from tests.support import TOLERANCE

REQUEST = ClickLog(load_config("tiny").schema, seed=5).draw_request(30, 6)
TENSORS = {"history": REQUEST.history[None], "candidates": REQUEST.candidates[None]}
INFER = "/v2/models/ranker/infer"
STOP_BOUND_SECONDS = 2
Reply = tuple[int, dict[str, str], Any]


@pytest.fixture(scope="module")
def guarded(server: TritonServer) -> str:
    """The guard's address."""
    return server.http_address


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> np.ndarray:
    """Scores, over gRPC and by the traditional scheme."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc_address)
    inputs = [tritonclient.grpc.InferInput(name, list(array.shape), "INT64") for name, array in TENSORS.items()]
    for entry, array in zip(inputs, TENSORS.values(), strict=True):
        entry.set_data_from_numpy(array)
    scores: np.ndarray = client.infer("ranker_full", inputs).as_numpy("scores")
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
    reply = ask(guarded, "/v2/models/user_encoder/infer", json.dumps({"inputs": [entry]}).encode())
    assert int(reply[1]["content-length"]) > 1 << 20
    client = tritonclient.grpc.InferenceServerClient(server.grpc_address)
    tensor = tritonclient.grpc.InferInput("history", [8, 96, 2], "INT64").set_data_from_numpy(history)
    over_grpc = client.infer("user_encoder", [tensor])
    client.close()
    for output in reply[2]["outputs"]:
        if output["name"] in ("user_keys", "user_values"):
            other = over_grpc.as_numpy(output["name"])
            np.testing.assert_allclose(np.array(output["data"], np.float32), other.ravel(), rtol=0, atol=TOLERANCE)


def test_a_shape_that_the_data_does_not_fill_is_refused_and_the_server_lives(server, guarded, expected):
    running = find_children(server.pid)
    entry = {"name": "history", "shape": [1, 3, 2], "datatype": "INT64", "data": [1]}
    status, _, table = ask(guarded, INFER, json.dumps({"inputs": [entry]}).encode())
    assert status == 400
    assert "expected 6 elements for its shape, got 1" in table["error"]
    assert find_children(server.pid) == running
    np.testing.assert_allclose(read_scores(ask(guarded, INFER, write_json())), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("body", [b"", b"garbage", b"[]", b'{"inputs":[],"inputs":[]}', b"[" * 1100, b"\xff"])
def test_malformed_json_is_the_callers_mistake(guarded, body):
    status, headers, table = ask(guarded, INFER, body)
    assert status == 400
    assert headers["content-type"].startswith("application/json")
    assert list(table) == ["error"]


@pytest.mark.parametrize("length", ["-1", "x", "99999", "1", "0"])
def test_a_wrong_header_length_is_the_callers_mistake(guarded, length):
    body, _ = write_binary()
    assert ask(guarded, INFER, body, {"Inference-Header-Content-Length": length})[0] == 400


def test_a_body_over_the_limit_is_refused_compressed_or_not(guarded):
    bomb = gzip.compress(bytes((64 << 20) + 1), compresslevel=1)
    assert ask(guarded, INFER, bomb, {"Content-Encoding": "gzip"})[0] == 413
    assert ask(guarded, INFER, b"x", {"Content-Length": str((64 << 20) + 1)})[0] == 413
    assert ask(guarded, INFER, write_json())[0] == 200


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


def test_readiness_is_what_the_launcher_says(tmp_path):
    upstream = Upstream(reply_with("200 x", b"{}"))
    with run_guard(http=upstream.address) as guard:
        assert ask(guard.http, "/v2/health/ready")[0] == 200
        assert ask(guard.http, "/v2/models/ranker/ready")[0] == 200
        reason = "ranker has been replaced 3 times"
        guard.tell(dataclasses.replace(READY, is_ready=False, reason=reason, broken=("doc_fusion",)))
        status, _, table = ask(guard.http, "/v2/health/ready")
        assert (status, table) == (503, {"error": reason})
        assert ask(guard.http, "/v2/models/ranker/ready")[0] == 503, "doc_fusion is a step of it"
        assert ask(guard.http, "/v2/models/ranker_resident/ready")[0] == 200
        assert ask(guard.http, "/kvcast/state")[2]["is_ready"] is False
        assert ask(guard.http, INFER.replace("ranker", "ranker_resident"), write_json())[0] == 200
        guard.state_file.write_text("{")
        time.sleep(0.1)
        assert ask(guard.http, "/v2/health/ready")[0] == 503, "half a file changes nothing"
        guard.tell(READY)
        assert ask(guard.http, "/v2/health/ready")[0] == 200
        guard.tell(dataclasses.replace(READY, is_draining=True))
        status, _, table = ask(guard.http, INFER, write_json())
        assert (status, table) == (503, {"error": "the server is stopping: try again, elsewhere if you can"})
        assert ask(guard.http, "/v2/health/ready")[0] == 503
    upstream.close()


def test_a_server_that_is_starting_or_away_is_503():
    starting = {"error": "the server is starting: try again"}
    away = {"error": "the server is starting or stopping: try again"}
    with run_guard(state=None) as guard:
        assert ask(guard.http, INFER, write_json())[::2] == (503, starting)
        assert ask(guard.http, "/v2/health/ready")[::2] == (503, {"error": "the server is starting"})
        guard.tell(READY)
        for path in ("/v2/health/ready", "/v2"):
            assert ask(guard.http, path)[::2] == (503, away)
        in_a_moment = write_json(parameters={"timeout": 300_000})
        status, _, table = ask(guard.http, INFER, in_a_moment)
        assert status == 503
        assert "deadline" in table["error"]


def test_idle_connections_do_not_hold_the_end():
    upstream = Upstream(reply_with("200 x", b"{}"))
    with run_guard(http=upstream.address) as guard:
        host, port = guard.http.split(":")
        silent = socket.create_connection((host, int(port)))
        idle = http.client.HTTPConnection(guard.http)
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()
        asked = time.monotonic()
        guard.process.send_signal(signal.SIGTERM)
        assert guard.process.wait(10) == 0
        assert time.monotonic() - asked < STOP_BOUND_SECONDS
        silent.close()
        idle.close()
    upstream.close()


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
        head = b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status.encode(), len(body))
        connection.sendall(head + body)

    return answer


@pytest.mark.parametrize(
    ("status", "message", "expected_status", "words"),
    [
        (
            "500 x",
            "Failed to increase the shared memory pool size for key 'x'",
            503,
            "busy: the server's shared memory",
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
    with run_guard(http=upstream.address) as guard:
        got_status, _, table = ask(guard.http, INFER, write_json())
    upstream.close()
    assert got_status == expected_status
    assert words in table["error"]
    assert "/srv" not in table["error"]


def test_a_request_whose_process_died_is_sent_again_when_that_is_mended():
    replies = [(b"500 x", b'{"error": "Stub process \'doc_fusion_0_0\' is not healthy."}'), (b"200 x", b"{}")]

    def answer(connection: socket.socket) -> None:
        status, body = replies.pop(0)
        connection.sendall(
            b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body
        )

    upstream = Upstream(answer)
    with run_guard(http=upstream.address) as guard, ask_later(guard.http) as got:
        time.sleep(0.3)
        guard.tell(dataclasses.replace(READY, is_ready=False, broken=("doc_fusion",), deaths={"doc_fusion": 1}))
        assert not got
        assert len(replies) == 1, "it waits"
        guard.tell(dataclasses.replace(READY, deaths={"doc_fusion": 1}))
    assert got[0][0] == 200
    upstream.close()


@contextlib.contextmanager
def ask_later(address: str) -> Iterator[list[Reply]]:
    """Ask in a thread; the reply is in the list when the block has ended."""
    replies: list[Reply] = []
    asking = threading.Thread(target=lambda: replies.append(ask(address, INFER, write_json())))
    asking.start()
    yield replies
    asking.join()


def test_the_upstream_gets_its_own_header_and_the_callers_none():
    upstream = Upstream(reply_with("200 x", b"{}"))
    with run_guard(http=upstream.address, environment={"KVCAST_GUARD_HEADER": "guard-key=a=b"}) as guard:
        assert ask(guard.http, INFER, write_json(), {"guard-key": "mine", "X-Own": "1", "traceparent": "t"})[0] == 200
    upstream.close()
    head = upstream.received.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    assert b"guard-key: a=b" in head
    assert b"traceparent: t" in head
    assert not [line for line in head if b"mine" in line or b"x-own" in line]


def test_a_request_in_flight_is_answered_before_the_end_and_new_ones_are_refused():
    upstream = Upstream(reply_with("200 x", b'{"late": true}', delay=1.0))
    with run_guard(http=upstream.address) as guard, ask_later(guard.http) as replies:
        time.sleep(0.4)
        guard.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        status, headers, table = ask(guard.http, INFER, write_json())
        assert (status, headers["connection"]) == (503, "close")
        assert table == {"error": "the server is stopping: try again, elsewhere if you can"}
        assert ask(guard.http, "/v2/health/ready")[0] == 503
        assert guard.process.wait(10) == 0
    upstream.close()
    assert replies[0][0] == 200
    assert replies[0][1]["connection"] == "close"


def test_an_answer_that_breaks_off_is_not_continued_with_another():
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 x\r\nContent-Length: 5000000\r\n\r\n" + bytes(2_000_000))

    upstream = Upstream(answer)
    with run_guard(http=upstream.address) as guard:
        check_that_it_breaks_off(guard.http, {})
    upstream.close()


@pytest.mark.parametrize("end", ["death", "stop", "deadline"])
def test_an_answer_that_has_been_begun_is_not_followed_by_another(end):
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 x\r\nContent-Length: 5000000\r\n\r\n" + bytes(2_000_000))
        over.wait(10)

    upstream = Upstream(answer)
    with run_guard("--drain-seconds", "0.1", http=upstream.address) as guard:

        def interrupt() -> None:
            time.sleep(0.5)
            if end == "death":
                guard.tell(dataclasses.replace(READY, deaths={"doc_fusion": 1}))
            elif end == "stop":
                guard.process.send_signal(signal.SIGTERM)

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        check_that_it_breaks_off(guard.http, {"parameters": {"timeout": 700_000}} if end == "deadline" else {})
        interrupting.join()
        over.set()
    upstream.close()


def check_that_it_breaks_off(address: str, changes: dict[str, Any]) -> None:
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("POST", INFER, write_json(**changes))
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)) as caught:
        connection.getresponse().read()
    assert b"error" not in getattr(caught.value, "partial", b"")
    assert b"HTTP" not in getattr(caught.value, "partial", b"")
    connection.close()


def test_the_drain_is_bounded():
    upstream = Upstream(reply_with("200 x", b"{}", delay=3))
    with run_guard("--drain-seconds", "0.3", http=upstream.address) as guard, ask_later(guard.http) as replies:
        time.sleep(0.3)
        asked = time.monotonic()
        guard.process.send_signal(signal.SIGTERM)
        assert guard.process.wait(10) == 0
        assert time.monotonic() - asked < STOP_BOUND_SECONDS
    assert replies[0][0] == 503
    assert "send it again" in replies[0][2]["error"]
    upstream.close()


def test_a_caller_who_goes_away_takes_the_question_along():
    gone = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.settimeout(10)
        if connection.recv(1) == b"":
            gone.set()

    upstream = Upstream(answer)
    with run_guard(http=upstream.address) as guard:
        connection = http.client.HTTPConnection(guard.http)
        connection.request("POST", INFER, write_json())
        time.sleep(0.3)
        connection.close()
        assert gone.wait(5)
        # The page asks this upstream too, which says nothing, and does without.
        with urllib.request.urlopen(f"http://{guard.metrics}/metrics", timeout=2 * ASK_SECONDS) as page:
            assert b'kvcast_guard_in_flight{model="ranker"} 0.0' in page.read()
    upstream.close()


def test_it_ends_with_the_process_that_started_it(tmp_path):
    command = ["-m", "kvcast.gateway", *make_addresses(), "--state", str(tmp_path / "state.json")]
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


@pytest.mark.parametrize(("option", "value"), [("--http", "x"), ("--upstream-grpc", ":1"), ("--metrics", "a:70000")])
def test_a_wrong_address_is_one_sentence(option, value):
    arguments = [*make_addresses(), "--state", "state.json", option, value]
    command = [sys.executable, "-m", "kvcast.gateway", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "expected HOST:PORT" in ended.stderr


def test_an_address_that_is_taken_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for option in ("--http", "--grpc", "--metrics"):
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            arguments = [*make_addresses(), "--state", str(tmp_path / "state.json"), option, address]
            command = [sys.executable, "-m", "kvcast.gateway", *arguments]
            ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
            assert ended.returncode == 1
            assert "Traceback" not in ended.stderr
            assert address.split(":")[1] in ended.stderr
