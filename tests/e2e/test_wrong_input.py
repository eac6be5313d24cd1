"""Everything a caller can get wrong, sent past the client's own checks: INVALID_ARGUMENT, a message, no traceback.

After each, the next valid request gets the same scores as before.
"""

import functools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from kvcast.protocol.config import load_config
from kvcast.server import TritonServer
from kvcast.synthetic import ClickLog
from tests.support import TOLERANCE

CONFIG = load_config("tiny")
REQUEST = ClickLog(CONFIG.schema, seed=1).draw_request(20, 5)
HISTORY, CANDIDATES = REQUEST.history[None], REQUEST.candidates[None]
Tensors = dict[str, np.ndarray]
Send = Callable[..., Tensors]


@pytest.fixture(params=["grpc", "http"])
def send(request: pytest.FixtureRequest, server: TritonServer) -> Any:
    """Send tensors to a model as they are, by plain tritonclient."""
    library = tritonclient.grpc if request.param == "grpc" else tritonclient.http
    client = library.InferenceServerClient(server.grpc_address if request.param == "grpc" else server.http_address)

    def call(model: str, tensors: Tensors, outputs: tuple[str, ...] = ("scores",)) -> Tensors:
        inputs = []
        for name, array in tensors.items():
            inputs.append(library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        reply = client.infer(model, inputs, outputs=[library.InferRequestedOutput(name) for name in outputs])
        return {name: reply.as_numpy(name) for name in outputs}

    yield call
    client.close()


def expect_refusal(send: Send, model: str, tensors: Tensors, *words: str) -> None:
    """Expect INVALID_ARGUMENT with these words, and the right scores afterwards."""
    before = send("ranker", {"history": HISTORY, "candidates": CANDIDATES})["scores"]
    with pytest.raises(InferenceServerException) as caught:
        send(model, tensors)
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")
    message = caught.value.message()
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert ".py" not in message
    after = send("ranker", {"history": HISTORY, "candidates": CANDIDATES})["scores"]
    np.testing.assert_allclose(after, before, rtol=0, atol=TOLERANCE)


WRONG_REQUESTS = {
    "history of int32": (HISTORY.astype(np.int32), CANDIDATES, ["history", "INT32", "INT64"]),
    "history of floats": (HISTORY.astype(np.float32), CANDIDATES, ["history", "FP32", "INT64"]),
    "history of NaN": (np.full(HISTORY.shape, np.nan, np.float32), CANDIDATES, ["history", "FP32", "INT64"]),
    "candidates of floats": (HISTORY, CANDIDATES.astype(np.float64), ["candidates", "FP64", "INT64"]),
    "history of rank 2": (HISTORY[0], CANDIDATES, ["history"]),
    "history of rank 4": (HISTORY[None], CANDIDATES, ["history", "[1,1,20,2]"]),
    "history with a field too few": (HISTORY[..., :1], CANDIDATES, ["history", "2 fields (item, action)", "got 1"]),
    "candidates with a field too many": (
        HISTORY,
        np.concatenate([CANDIDATES, CANDIDATES], axis=2),
        ["candidates", "4 fields (item, category, brand, price_bucket)", "got 8"],
    ),
    "a negative id": (-HISTORY, CANDIDATES, ["history", "'item' within 0..499", "got -"]),
    "an id outside the vocabulary": (HISTORY, CANDIDATES + 500, ["candidates", "'item' within 0..499"]),
    "the largest id there is": (np.full_like(HISTORY, 2**63 - 1), CANDIDATES, ["history", str(2**63 - 1)]),
    "the smallest id there is": (np.full_like(HISTORY, -(2**63)), CANDIDATES, ["history", str(-(2**63))]),
    "N = 0": (HISTORY, CANDIDATES[:, :0], ["candidates", "N = 1 to 64", "got 0"]),
    "N over the limit": (HISTORY, np.ones((1, 65, 4), np.int64), ["candidates", "N = 1 to 64", "got 65"]),
    "L over the limit": (np.ones((1, 97, 2), np.int64), CANDIDATES, ["history", "L = 96", "got 97"]),
    "a history of 32 MB": (np.ones((1, 2_000_000, 2), np.int64), CANDIDATES, ["history", "got 2000000"]),
    "two users and one": (np.repeat(HISTORY, 2, axis=0), CANDIDATES, ["batch size"]),
    "no users": (HISTORY[:0], CANDIDATES[:0], [""]),
    "too many users": (np.repeat(HISTORY, 9, axis=0), np.repeat(CANDIDATES, 9, axis=0), ["batch-size must be <= 8"]),
}


@pytest.mark.parametrize("model", ["ranker", "ranker_full"])
@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_wrong_request(send, model, name):
    history, candidates, words = WRONG_REQUESTS[name]
    expect_refusal(send, model, {"history": history, "candidates": candidates}, *words)


@pytest.mark.parametrize("missing", ["history", "candidates"])
def test_missing_tensor(send, missing):
    tensors = {"history": HISTORY, "candidates": CANDIDATES}
    del tensors[missing]
    expect_refusal(send, "ranker", tensors, missing)


def damage(tensors: Tensors, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Tensors:
    return {**tensors, name: np.ascontiguousarray(change(tensors[name].copy()))}


def set_one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[0, 1, 1, 2, 3] = value
        return array

    return change


WRONG_KV: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], list[str]]] = {
    "NaN in keys": ("user_keys", set_one(np.nan), ["user_keys", "finite", "nan"]),
    "NaN in values": ("user_values", set_one(np.nan), ["user_values", "finite", "nan"]),
    "minus infinity in keys": ("user_keys", set_one(-np.inf), ["user_keys", "finite", "-inf"]),
    "numbers that overflow": ("user_keys", lambda array: array * 0 + 3e38, ["user KV", "overflow"]),
    "a layer too few": (
        "user_keys",
        lambda array: array[:, :1],
        ["user_keys", "[1, 2, 2, 18, 21]", "[1, 1, 2, 18, 21]"],
    ),
    "a layer too many": (
        "user_values",
        lambda array: np.repeat(array, 2, axis=1),
        ["user_values", "[1, 4, 2, 21, 17]"],
    ),
    "slots that disagree": ("user_values", lambda array: array[:, :, :, :-1], ["user_values", "[1, 2, 2, 20, 17]"]),
    "no slots": ("user_keys", lambda array: array[..., :0], ["user_keys", "slots"]),
    "another kv_id": ("kv_id", lambda array: array ^ 1, ["kv_id", "encode the history again"]),
}


@pytest.mark.parametrize("name", WRONG_KV)
def test_wrong_user_kv_sent_straight_to_fusion(send, name):
    tensor, change, words = WRONG_KV[name]
    encoded = send("user_encoder", {"history": HISTORY}, ("user_keys", "user_values", "kv_id"))
    expected = send("ranker", {"history": HISTORY, "candidates": CANDIDATES})["scores"]
    untouched = send("doc_fusion", {**encoded, "candidates": CANDIDATES})["scores"]
    np.testing.assert_allclose(untouched, expected, rtol=0, atol=TOLERANCE)
    expect_refusal(send, "doc_fusion", {**damage(encoded, tensor, change), "candidates": CANDIDATES}, *words)


def test_the_proof_of_origin_stays_within_the_server(server, send):
    """Who could send it would have KV fused that was not scanned."""
    for outputs in (("kv_origin",), ("user_keys", "kv_origin")):
        with pytest.raises(InferenceServerException, match="kv_origin: expected it within the server alone"):
            send("user_encoder", {"history": HISTORY}, outputs)
    encoded = send("user_encoder", {"history": HISTORY}, ("user_keys", "user_values", "kv_id"))
    sent = {**encoded, "candidates": CANDIDATES, "kv_origin": np.zeros((1, 16), np.uint8)}
    expect_refusal(send, "doc_fusion", sent, "kv_origin")
    inputs = [tritonclient.grpc.InferInput("history", list(HISTORY.shape), "INT64")]
    inputs[0].set_data_from_numpy(HISTORY)
    named = [tritonclient.grpc.InferRequestedOutput("kv_origin")]
    with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
        assert not client.infer("user_encoder", inputs).as_numpy("kv_origin").any()
    with tritonclient.grpc.InferenceServerClient(server.direct_grpc_address) as client:
        assert client.infer("user_encoder", inputs, outputs=named).as_numpy("kv_origin").any(), "the ensemble has it"


def test_an_invalid_request_does_not_affect_others_of_its_batch(server):
    """Valid and wrong requests in flight together: each gets its own answer."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc_address)
    replies: list[tuple[int, Any, Any]] = []

    def submit(index: int) -> None:
        wrong = index % 3 == 0
        inputs = []
        for name, array in (("history", HISTORY + (1000 if wrong else 0)), ("candidates", CANDIDATES)):
            inputs.append(tritonclient.grpc.InferInput(name, list(array.shape), "INT64"))
            inputs[-1].set_data_from_numpy(array)
        client.async_infer("ranker", inputs, lambda result, error: replies.append((index, result, error)))

    for index in range(60):
        submit(index)
    deadline = time.monotonic() + 30
    while len(replies) < 60 and time.monotonic() < deadline:
        time.sleep(0.01)
    client.close()
    assert sorted(index for index, _, _ in replies) == list(range(60))
    scores = [result.as_numpy("scores") for index, result, _ in replies if index % 3]
    np.testing.assert_allclose(np.concatenate(scores), np.repeat(scores[0], 40, axis=0), rtol=0, atol=TOLERANCE)
    for _, result, error in (reply for reply in replies if reply[0] % 3 == 0):
        assert result is None
        assert "within 0..499" in str(error)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"garbage", "JSON"),
        (b"{}", "inputs"),
        (
            {"inputs": [{"name": "history", "shape": [1, 1, 2], "datatype": "INT64", "data": [1, 2.5]}]},
            "whole numbers for int64",
        ),
        ({"inputs": [{"name": "history", "shape": [1, 5, 2], "datatype": "INT64", "data": [1, 2]}]}, "shape"),
    ],
    ids=["not JSON", "no inputs", "a fraction", "too little data"],
)
def test_raw_http_bodies_are_refused(server, body, words):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://{server.http_address}/v2/models/ranker/infer"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, data=data))
    with caught.value as reply:
        assert words.lower() in reply.read().decode().lower()


def test_a_request_that_waits_longer_than_its_deadline_is_refused_and_not_computed(server):
    """The client's deadline reaches the first queue: with a microsecond to wait, what has to wait is refused."""
    client = tritonclient.grpc.InferenceServerClient(server.grpc_address)
    history, candidates = np.ones((1, 96, 2), np.int64), np.ones((1, 64, 4), np.int64)
    inputs = []
    for name, array in (("history", history), ("candidates", candidates)):
        inputs.append(tritonclient.grpc.InferInput(name, list(array.shape), "INT64"))
        inputs[-1].set_data_from_numpy(array)
    for model in ("ranker_full", "ranker"):
        replies: list[tuple[Any, Any]] = []
        collect = functools.partial(lambda to, result, error: to.append((result, error)), replies)
        for _ in range(40):
            client.async_infer(model, inputs, collect, timeout=1)
        deadline = time.monotonic() + 60
        while len(replies) < 40 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = [error for result, error in replies if error is not None]
        assert len(replies) == 40
        assert refused, f"{model}: a queue of forty cannot be empty within a microsecond"
        assert {error.status() for error in refused} == {"StatusCode.DEADLINE_EXCEEDED"}
    client.close()
