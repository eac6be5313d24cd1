"""The request log: a line of JSON a request, with how it was made, and callers who notice nothing of it."""

import io
import json
import secrets
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from kvcast.client import RankerClient
from kvcast.gateway.request_log import RequestLog
from kvcast.protocol.errors import TryAgainError
from kvcast.protocol.tensors import CANDIDATES, ENCODE_REPORT, FUSE_REPORT, HISTORY, REPORT_PARAMETER, SCORES
from tests.gateway_process import run_gateway
from tests.processes import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
USERS_OWN = "31415926"


class Lines:
    """The JSON lines of a gateway and of the models behind it, read as they come."""

    def __init__(self, gateway, of_models: io.StringIO) -> None:
        self.lines: list[dict] = []
        self._of_models = of_models
        self._thread = threading.Thread(target=self._read, args=(gateway.process.stdout,), daemon=True)
        self._thread.start()

    def _read(self, stream) -> None:
        for line in stream:
            if line.startswith("{"):
                self.lines.append(json.loads(line))

    def take(self) -> dict:
        """Return the only line of the gateway that there is now."""
        wait_until(lambda: bool(self.lines), 5)
        assert len(self.lines) == 1, self.lines
        return self.lines.pop()

    def take_of_models(self, request_id: str, count: int) -> dict:
        """Return what the models say of a request, in that many lines, merged."""
        wait_until(lambda: len(self._find(request_id)) == count, 5)
        merged: dict = {}
        for line in self._find(request_id):
            merged |= {name: value for name, value in line.items() if value or name not in merged}
        return merged

    def _find(self, request_id: str) -> list[dict]:
        lines = [json.loads(line) for line in self._of_models.getvalue().splitlines() if line.startswith("{")]
        return [line for line in lines if line["request_id"] == request_id]


@pytest.fixture(scope="module")
def gateway(server):
    """A second gateway before the server, which logs everything."""
    http, grpc = f"127.0.0.1:{server._ports[0]}", server.direct_grpc_address
    with run_gateway(http=http, grpc=grpc, log_requests=1.0) as running:
        running.lines = Lines(running, server.log)
        yield running


def draw(length: int, count: int = 5):
    generator = np.random.default_rng()
    history = generator.integers(1, 8, (1, length, 2))
    return history, generator.integers(1, 8, (1, count, 4))


def ask(gateway, protocol: str, model: str, history, candidates, outputs=(SCORES.name,), **arguments):
    library = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    inputs = []
    for name, array in ((HISTORY.name, history), (CANDIDATES.name, candidates)):
        inputs.append(library.InferInput(name, list(array.shape), "INT64"))
        inputs[-1].set_data_from_numpy(array)
    wanted = [library.InferRequestedOutput(name) for name in outputs] or None
    with library.InferenceServerClient(getattr(gateway, protocol)) as client:
        return client.infer(model, inputs, outputs=wanted, **arguments)


def list_outputs(reply) -> set[str]:
    response = reply.get_response()
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    return {each["name"] if isinstance(each, dict) else each.name for each in outputs}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("model", ["ranker", "ranker_resident"])
@pytest.mark.parametrize("outputs", [(SCORES.name,), ()], ids=["scores", "all"])
def test_a_line_says_how_it_was_made_and_the_reply_is_the_same(server, gateway, protocol, model, outputs):
    history, candidates = draw(length=23)
    request_id = secrets.token_hex(4)
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-kvcast-user": USERS_OWN}
    logged = ask(gateway, protocol, model, history, candidates, outputs, request_id=request_id, headers=headers)
    line = gateway.lines.take()
    plain = ask(server_of(server), protocol, model, history, candidates, outputs)
    np.testing.assert_array_equal(logged.as_numpy(SCORES.name), plain.as_numpy(SCORES.name))
    assert list_outputs(logged) == list_outputs(plain)
    assert not list_outputs(logged) & {ENCODE_REPORT.name, FUSE_REPORT.name}
    expected = {
        "request_id": request_id, "trace_id": TRACE, "protocol": protocol, "model": model, "users": 1, "events": 23,
        "candidates": 5, "code": "OK", "attempts": 1,
    }  # fmt: skip
    assert {name: line.get(name) for name in expected} == expected
    count = 1 if model == "ranker_resident" else 2
    made = gateway.lines.take_of_models(request_id, count)
    assert made["cache"] == "miss"
    assert 0 < made["encode_seconds"] + made["fuse_seconds"] < line["seconds"] < 10
    assert 0 <= line["gate_seconds"] < line["seconds"]
    assert line["bytes"] > 8 * (history.size + candidates.size)
    ask(gateway, protocol, model, history, candidates, outputs)
    again = gateway.lines.take()
    made = gateway.lines.take_of_models(again["request_id"], count)
    assert (made["cache"], made["encode_seconds"]) == ("hit", 0)
    assert 0 < made["fuse_seconds"] < again["seconds"]
    assert again["request_id"] not in ("", request_id)
    text = json.dumps([line, again, made])
    assert USERS_OWN not in text
    assert not {"history", "scores", "user_id"} & {*line, *again, *made}


def server_of(server):
    class Addresses:
        grpc, http = server.grpc_address, server.http_address

    return Addresses


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_who_asks_for_the_report_gets_it(gateway, protocol):
    history, candidates = draw(length=9)
    with RankerClient(getattr(gateway, protocol), protocol=protocol) as client:
        client.get_manifest()
        gateway.lines.take()
        trace = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        assert client.rank(history[0], candidates[0], report=True, headers=trace).report.cache == "miss"
        assert gateway.lines.take()["trace_id"] == TRACE
    outputs = (SCORES.name, ENCODE_REPORT.name)
    reply = ask(gateway, protocol, "ranker", history, candidates, outputs, parameters={REPORT_PARAMETER: True})
    assert list_outputs(reply) == set(outputs)
    line = gateway.lines.take()
    assert gateway.lines.take_of_models(line["request_id"], 2)["cache"] == "hit"


def test_json_in_json_out(gateway):
    history, candidates = draw(length=3)
    body = {
        "inputs": [
            {"name": name, "datatype": "INT64", "shape": list(array.shape), "data": array.ravel().tolist()}
            for name, array in ((HISTORY.name, history), (CANDIDATES.name, candidates))
        ],
        "outputs": [{"name": SCORES.name}],
    }
    url = f"http://{gateway.http}/v2/models/ranker/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=10) as reply:
        assert "Inference-Header-Content-Length" not in reply.headers
        (output,) = json.load(reply)["outputs"]
    scores = ask(gateway, "grpc", "ranker", history, candidates).as_numpy(SCORES.name)
    assert np.array_equal(np.float32(output["data"]), scores[0])
    wait_until(lambda: len(gateway.lines.lines) == 2, 5)
    assert [line["code"] for line in gateway.lines.lines] == ["OK", "OK"]
    gateway.lines.lines.clear()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_error_is_a_line_with_its_code(gateway, protocol):
    history, candidates = draw(length=2)
    with pytest.raises(InferenceServerException):
        ask(gateway, protocol, "ranker", history, candidates + 10**9)
    line = gateway.lines.take()
    assert (line["code"], line["attempts"]) == ("INVALID_ARGUMENT", 1)
    with pytest.raises(InferenceServerException):
        ask(gateway, protocol, "no_such_model", history, candidates)
    assert gateway.lines.take()["code"] in ("NOT_FOUND", "INVALID_ARGUMENT")


def test_garbage_is_a_line_too(gateway):
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"http://{gateway.http}/v2/models/ranker/infer", b"{", timeout=10)
    line = gateway.lines.take()
    assert (line["code"], line["attempts"], line["model"]) == ("INVALID_ARGUMENT", 0, "ranker")


def test_a_share_is_logged_and_nothing_without_one():
    lines: list[str] = []
    draws = iter([0.05, 0.5, 0.09, 0.1])
    log = RequestLog(0.1, lines.append, lambda: next(draws))
    for _ in range(4):
        with log.follow("grpc", "ranker", lambda: "f" * 64) as entry:
            assert entry is None or entry.fields["model"] == "ranker"
    wait_until(lambda: len(lines) == 2, 5)
    with RequestLog(0.0, lines.append, lambda: 0.0).follow("grpc", "ranker", str) as entry:
        assert entry is None


def test_lines_that_nobody_reads_hold_nobody_up_and_are_counted():
    """A reader that is stuck: lines are dropped, and the next that fits says how many."""
    lines: list[str] = []
    stuck = threading.Event()
    log = RequestLog(1.0, lambda line: (stuck.wait(10), lines.append(line))[0])
    for _ in range(1100):
        with pytest.raises(TryAgainError), log.follow("http", "ranker", str):
            raise TryAgainError
    stuck.set()
    wait_until(lambda: len(lines) >= 1000, 5)
    with log.follow("http", "ranker", str):
        pass
    wait_until(lambda: any("dropped_lines" in line for line in lines), 5)
    last = json.loads(lines[-1])
    assert len(lines) - 1 + last["dropped_lines"] == 1100
    assert {json.loads(line)["code"] for line in lines[:-1]} == {"UNAVAILABLE"}
