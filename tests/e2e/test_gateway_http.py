"""The gateway's HTTP side: Triton's own answers, refusals, a quick and clean end.

What both protocols share, and needs an upstream that answers as told, is tested over gRPC in test_gateway_grpc.py.
"""

import contextlib
import dataclasses
import gzip
import http.client
import http.server
import json
import signal
import socket
import subprocess
import threading
import time
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from kvcast.gateway.http_inference import MAX_JSON_TENSOR_BYTES
from kvcast.protocol.config import load_config
from kvcast.server import TritonServer
from kvcast.synthetic import ClickLog
from tests.gateway_process import READY, make_config, run_gateway, start_gateway
from tests.processes import find_children, wait_until
from tests.support import TOLERANCE

REQUEST = ClickLog(load_config("tiny").schema, seed=5).draw_request(30, 6)
TENSORS = {"history": REQUEST.history[None], "candidates": REQUEST.candidates[None]}
INFER = "/v2/models/ranker/infer"
STOP_BOUND_SECONDS = 2
Reply = tuple[int, dict[str, str], Any]


@pytest.fixture(scope="module")
def guarded(server: TritonServer) -> str:
    """The gateway's address."""
    return server.http_address


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> np.ndarray:
    """Scores, over gRPC and by full recomputation."""
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


def write_binary(**changes: Any) -> tuple[bytes, dict[str, str]]:
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "INT64",
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in TENSORS.items()
    ]
    header = json.dumps({"inputs": inputs, **changes}).encode()
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
    is_json = content.startswith((b"{", b"[")) and "inference-header-content-length" not in found
    return response.status, found, json.loads(content) if is_json else content


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
    body, headers = write_binary(outputs=[{"name": "scores", "parameters": {"binary_data": True}}])
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


def test_a_tensor_too_large_for_json_is_sent_as_binary_data(guarded):
    history = np.ones((8, 96, 2), np.int64)
    entry = {"name": "history", "shape": [8, 96, 2], "datatype": "INT64", "data": history.ravel().tolist()}
    outputs = [{"name": "user_keys", "parameters": {"binary_data": is_binary}} for is_binary in (False, True)]
    as_json, as_binary = (
        ask(guarded, "/v2/models/user_encoder/infer", json.dumps({"inputs": [entry], "outputs": [each]}).encode())
        for each in outputs
    )
    assert as_binary[0] == 200
    length = int(as_binary[1]["inference-header-content-length"])
    header = json.loads(as_binary[2][:length]) if isinstance(as_binary[2], bytes) else as_binary[2]
    (output,) = header["outputs"]
    assert output["parameters"]["binary_data_size"] == 4 * np.prod(output["shape"])
    if output["parameters"]["binary_data_size"] > MAX_JSON_TENSOR_BYTES:
        assert as_json[0] == 400
        assert "ask for binary data" in as_json[2]["error"]
    else:
        assert len(as_json[2]["outputs"][0]["data"]) == np.prod(output["shape"])


REPLIES = {
    "outputs not named": {},
    "named": {"outputs": [{"name": "scores"}]},
    "as binary data": {"outputs": [{"name": "scores", "parameters": {"binary_data": True}}]},
    "not as binary data": {"outputs": [{"name": "scores", "parameters": {"binary_data": False}}]},
    "all as binary data": {"parameters": {"binary_data_output": True}},
    "all as binary data and one named": {"parameters": {"binary_data_output": True}, "outputs": [{"name": "scores"}]},
    "an id": {"id": "x1", "outputs": [{"name": "scores"}]},
    "a classification": {"outputs": [{"name": "scores", "parameters": {"classification": 3}}]},
    "a classification as binary data": {
        "outputs": [{"name": "scores", "parameters": {"classification": 3, "binary_data": True}}]
    },
    "parameters": {"parameters": {"priority": 1, "sequence_id": 5, "own": 1.5, "text": "x"}},
    "a sequence": {"parameters": {"sequence_id": "abc", "sequence_start": True}},
    "an output that is not there": {"outputs": [{"name": "nothing"}]},
}


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("name", REPLIES)
def test_replies_are_those_of_tritons_own_http(server, guarded, name, is_binary):
    """The gateway turns HTTP into gRPC and back: nothing of that shows."""
    body, headers = write_binary(**REPLIES[name]) if is_binary else (write_json(**REPLIES[name]), {})
    key = dict([server._inference_header])
    own, tritons = ask(guarded, INFER, body, headers), ask(f"127.0.0.1:{server._ports[0]}", INFER, body, headers | key)
    assert own[0] == tritons[0]
    lengths = [int(reply[1].get("inference-header-content-length", 0)) for reply in (own, tritons)]
    tables = [
        json.loads(reply[2][:length]) if length else reply[2]
        for reply, length in zip((own, tritons), lengths, strict=True)
    ]
    tables[0].pop("reason", None)
    assert tables[0] == tables[1]
    if all(lengths):
        assert own[2][lengths[0] :] == tritons[2][lengths[1] :]
    assert bool(lengths[0]) == bool(lengths[1])


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
    assert (list(table), table["reason"]) == (["error", "reason"], "INVALID_ARGUMENT")


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
    status, _, table = ask(guarded, "/v2/repository/index", b"[]", server.admin_headers)
    assert (status, table["error"]) == (400, "body: expected `object`, got []")
    status, _, models = ask(guarded, "/v2/repository/index", b"", server.admin_headers)
    assert status == 200
    assert "ranker" in [model["name"] for model in models]


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"), ("deflate", "deflate"), ("deflate, gzip;q=0.5", "gzip"), ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0", None), ("gzip; q=0.000", None), ("br", None), ("identity", None),
    ],
)  # fmt: skip
def test_a_reply_is_compressed_where_that_is_accepted(guarded, accepted, coding):
    connection = http.client.HTTPConnection(guarded, timeout=30)
    connection.request("POST", INFER, write_json(), {"Accept-Encoding": accepted})
    response = connection.getresponse()
    response.read()
    connection.close()
    assert (response.status, response.getheader("Content-Encoding")) == (200, coding)


def test_an_encoding_that_is_not_read_is_named(guarded):
    status, _, table = ask(guarded, INFER, b"x", {"Content-Encoding": "br"})
    assert (status, table["error"]) == (415, "Content-Encoding: expected one of identity, gzip, deflate, got 'br'")


def test_health_is_told_to_clients_that_read_json(guarded):
    assert ask(guarded, "/v2/health/live")[2] == {"live": True}
    assert ask(guarded, "/v2/health/ready")[2] == {"ready": True}
    assert ask(guarded, "/v2/models/ranker/ready")[2] == {"name": "ranker", "ready": True}
    assert ask(guarded, "/v2/models/nothing/ready")[0] == 400
    extensions = ask(guarded, "/v2")[2]["extensions"]
    assert "binary_tensor_data" in extensions
    assert not {"sequence", "system_shared_memory", "cuda_shared_memory"} & set(extensions)


@pytest.mark.parametrize(("size", "status"), [(9_000, 200), (30_000, 200), (33_000, 431), (100_000, 431)])
def test_long_headers_are_taken_up_to_a_limit_that_is_named(guarded, size, status):
    for _ in range(5):
        got, _, table = ask(guarded, INFER, write_json(), {"Authorization": "x" * size})
        assert got == status
        assert status == 200 or "headers: expected at most 32768 bytes" in table["error"]


def test_readiness_is_what_the_launcher_says():
    with Upstream() as upstream, run_gateway(http=upstream.address) as gateway:
        assert ask(gateway.http, "/v2/health/ready")[0] == 200
        assert ask(gateway.http, "/v2/models/ranker/ready")[0] == 200
        reason = "ranker has been replaced 3 times"
        gateway.tell(dataclasses.replace(READY, is_ready=False, reason=reason, broken=("doc_fusion",)))
        status, _, table = ask(gateway.http, "/v2/health/ready")
        assert (status, table) == (503, {"error": reason, "reason": "UNAVAILABLE"})
        assert ask(gateway.http, "/v2/models/ranker/ready")[0] == 503, "doc_fusion is a step of it"
        assert ask(gateway.http, "/v2/models/ranker_resident/ready")[0] == 200
        assert ask(gateway.http, "/kvcast/state")[2]["is_ready"] is False
        gateway.tell(READY)
        assert ask(gateway.http, "/v2/health/ready")[0] == 200
        gateway.tell(dataclasses.replace(READY, is_draining=True))
        status, _, table = ask(gateway.http, INFER, write_json())
        assert (status, table["error"]) == (503, "the server is stopping: try again, elsewhere if you can")
        assert ask(gateway.http, "/v2/health/ready")[0] == 503


def test_a_server_that_is_starting_or_away_is_503():
    away = (503, "the server is starting or stopping: try again")
    with run_gateway(state=None) as gateway:
        assert ask_error(gateway.http, INFER, write_json()) == (503, "the server is starting: try again")
        assert ask_error(gateway.http, "/v2/health/ready") == (503, "the server is starting")
        for model in ("ranker", "another"):
            assert ask_error(gateway.http, f"/v2/models/{model}/ready") == (503, f"{model}: the server is starting")
        gateway.tell(READY)
        for path in ("/v2/health/ready", "/v2"):
            assert ask_error(gateway.http, path) == away
        status, message = ask_error(gateway.http, INFER, write_json(parameters={"timeout": 300_000}))
        assert status in (503, 504)
        assert "deadline" in message or "unanswered" in message


def ask_error(address: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    status, _, table = ask(address, path, body)
    return status, table["error"]


def test_idle_connections_do_not_hold_the_end():
    with Upstream() as upstream, run_gateway(http=upstream.address) as gateway:
        host, port = gateway.http.split(":")
        silent = socket.create_connection((host, int(port)))
        idle = http.client.HTTPConnection(gateway.http)
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()
        asked = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(10) == 0
        assert time.monotonic() - asked < STOP_BOUND_SECONDS
        silent.close()
        idle.close()


class Upstream:
    """An HTTP server that answers everything with 200 and `{}`."""

    def __init__(self) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answerer)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Upstream":
        """Listen."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


class Answerer(http.server.BaseHTTPRequestHandler):
    """Says yes."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *arguments: object) -> None:
        pass


def test_new_connections_are_refused_and_old_ones_closed_at_the_end():
    with Upstream() as upstream, run_gateway(http=upstream.address, leave_seconds=1.0) as gateway:
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(gateway.http, "/v2/health/ready")[0] == 503, 5)
        assert ask(gateway.http, "/v2/health/live")[0] == 200, "it still answers"
        assert gateway.process.wait(10) == 0


@pytest.mark.parametrize("trace", [b"x\x80", b"\xff", b"00-" + b"a" * 5000, b""])
def test_a_trace_that_is_none_costs_no_answer(guarded, expected, trace):
    reply = ask(guarded, INFER, write_json(), {"traceparent": trace, "tracestate": trace})
    np.testing.assert_allclose(read_scores(reply), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("line", [b'{"is_ready": true', b"x\n", b'"' + b"x" * (2 << 20) + b'"\n'])
def test_it_ends_with_a_launcher_that_makes_no_sense(line):
    process, control = start_gateway(make_config())
    with control, contextlib.suppress(OSError):
        control.sendall(line)
    assert process.wait(10) == 0
    process.communicate()


def test_it_ends_with_the_process_that_started_it():
    process, control = start_gateway(make_config())
    assert process.poll() is None
    control.close()
    assert process.wait(10) == 0
    process.communicate()


def test_an_address_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option in ("http_port", "grpc_port", "metrics_port"):
            process, control = start_gateway(make_config(**{option: port}), stderr=subprocess.PIPE)
            _, said = process.communicate(timeout=20)
            control.close()
            assert process.returncode == 1
            assert "Traceback" not in said
            assert str(port) in said
