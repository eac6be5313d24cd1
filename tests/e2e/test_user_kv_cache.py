"""Served: cache hits give exactly the scores of `ranker_full`, whatever the budget.

Histories are drawn from a seed of the test's own, so that a first visit is a first visit on the shared server too.
"""

import asyncio
import contextlib
import dataclasses
import json
import queue
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from kvcast.client import AsyncRankerClient, InvalidRequestError, RankerClient
from kvcast.client.__main__ import main
from kvcast.client.clients import Conversation
from kvcast.export.calls import OnnxCalls
from kvcast.export.pipeline import WeightsSource, export_release
from kvcast.export.proofs import draw_sample, prove
from kvcast.protocol.config import load_config
from kvcast.protocol.manifest import read_manifest
from kvcast.protocol.report import CacheResult, Report
from kvcast.protocol.request import RankRequest
from kvcast.protocol.tensors import EXPORTED_MODELS
from kvcast.server import TritonServer
from kvcast.serving.options import CACHE_PARAMETERS
from kvcast.synthetic import ClickLog
from tests.conftest import make_settings
from tests.e2e.test_served_parity import PROTOCOLS, address_of, make_client
from tests.parity.test_resident import RanksInTwoCalls
from tests.support import TOLERANCE

CONFIG = load_config("tiny")
HIT, MISS, OFF = CacheResult.HIT, CacheResult.MISS, CacheResult.OFF
MODELS = ("ranker", "ranker_resident")
# Whose cache and whose runs a request to these models uses.
CACHED_BY = {"ranker": "user_encoder", "ranker_resident": "ranker_resident"}
FUSED_BY = {"ranker": "doc_fusion", "ranker_resident": "ranker_resident"}
# Where a budget counts users, their histories have this length.
LENGTH = 40
ROOM = 5
# More than an entry holds beside its KV, and little enough that the rest of ROOM of them is no room for another.
ENTRY_OVERHEAD = 4096
Ids = np.ndarray
Tensors = dict[str, np.ndarray]
Start = Callable[..., TritonServer]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start servers of this file's own; all are stopped together, as each takes its two seconds."""
    running: list[TritonServer] = []

    def start_one(repository: Path, **changes: Any) -> TritonServer:
        running.append(TritonServer(dataclasses.replace(make_settings(repository), **changes)))
        running[-1].start()
        return running[-1]

    yield start_one
    with ThreadPoolExecutor(len(running) or 1) as pool:
        list(pool.map(TritonServer.stop, running))


@pytest.fixture(scope="module")
def entry_bytes(tiny_repository: Path) -> int:
    return read_manifest(tiny_repository / "user_encoder" / "1").user_kv.bytes_of(LENGTH)


@pytest.fixture(scope="module")
def start_with(tiny_repository: Path, start: Start) -> Start:
    """Start a server whose caches have another budget."""

    def start_one(budget_bytes: float, seconds: float = 0) -> TritonServer:
        budget, limit = CACHE_PARAMETERS
        return start(tiny_repository, parameters={budget: f"{budget_bytes / 1e6:.6f}", limit: f"{seconds}"})

    return start_one


@pytest.fixture(scope="module")
def small(start_with: Start, entry_bytes: int) -> TritonServer:
    """Room for ROOM users of LENGTH events."""
    return start_with(ROOM * (entry_bytes + ENTRY_OVERHEAD))


@pytest.fixture(scope="module")
def fleeting(start_with: Start, entry_bytes: int) -> TritonServer:
    """Room for some users, for a second."""
    return start_with(2 * ROOM * (entry_bytes + ENTRY_OVERHEAD), seconds=1)


@pytest.fixture(scope="module")
def off(start_with: Start) -> TritonServer:
    return start_with(0)


@pytest.fixture(scope="module")
def narrow(start_with: Start, entry_bytes: int) -> TritonServer:
    """Too little for one user of LENGTH events."""
    return start_with(entry_bytes // 2)


@pytest.fixture
def log(request: pytest.FixtureRequest) -> ClickLog:
    """Users whom no other test draws."""
    return ClickLog(CONFIG.schema, seed=zlib.crc32(f"{__name__} {request.node.name}".encode()))


@pytest.fixture(scope="module")
def full(server: TritonServer) -> Iterator[RankerClient]:
    """The reference, for every server of this release."""
    with make_client(server, "grpc", "ranker_full") as client:
        yield client


def expect_right(full: RankerClient, history: Ids, candidates: Ids, scores: Ids) -> None:
    np.testing.assert_allclose(scores, full.rank(history, candidates).scores, rtol=0, atol=TOLERANCE)


def visit(client: RankerClient, full: RankerClient, history: Ids, candidates: Ids) -> Report:
    """Rank, expect the right scores, and return the report."""
    ranking = client.rank(history, candidates, report=True)
    expect_right(full, history, candidates, ranking.scores)
    assert ranking.report is not None
    return ranking.report


def is_listening(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


class Meter:
    """What a model's metrics have grown by since this was made."""

    SAMPLE = re.compile(r"^kvcast_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
    LABEL = re.compile(r'(\w+)="([^"]*)"')

    def __init__(self, server: TritonServer, model: str) -> None:
        self._address = f"{server.settings.host}:{server.settings.metrics_port}"
        self._model = model
        # Triton opens this port a few milliseconds after it has said that it is ready.
        deadline = time.monotonic() + 10
        while not is_listening(server.settings.metrics_port):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self._before = self._read()

    def __call__(self, name: str) -> float:
        """Return the growth of a metric, its code after it if it has one: `errors_total INTERNAL`."""
        return self._read()[name] - self._before[name]

    def show(self, name: str) -> float:
        """Return the metric itself."""
        return self._read()[name]

    def _read(self) -> Counter[str]:
        with urllib.request.urlopen(f"http://{self._address}/metrics") as reply:
            text = reply.read().decode()
        values: Counter[Any] = Counter()
        for name, labels, value in self.SAMPLE.findall(text):
            label = dict(self.LABEL.findall(labels))
            if label.get("model") == self._model and "le" not in label:
                values[" ".join(filter(None, (name, label.get("code"))))] += float(value)
        return values


class Raw(NamedTuple):
    """A reply as plain tritonclient shows it: outputs by name, and the size of the message."""

    outputs: Tensors
    size: int


def send(
    server: TritonServer,
    protocol: str,
    model: str,
    tensors: Tensors,
    outputs: list[str] | None = None,
    parameters: dict[str, Any] | None = None,
) -> Raw:
    """Send tensors unchecked, with plain tritonclient; without `outputs`, none is requested by name."""
    library = tritonclient.grpc if protocol == "grpc" else tritonclient.http
    names = [library.InferRequestedOutput(name) for name in outputs] if outputs else None
    with contextlib.closing(library.InferenceServerClient(address_of(server, protocol))) as client:
        reply = client.infer(model, make_inputs(library, tensors), outputs=names, parameters=parameters)
        message = reply.get_response()
    if protocol == "grpc":
        return Raw({each.name: reply.as_numpy(each.name) for each in message.outputs}, message.ByteSize())
    sizes = (each.get("parameters", {}).get("binary_data_size", 0) for each in message["outputs"])
    size = len(json.dumps(message)) + sum(sizes)
    return Raw({each["name"]: reply.as_numpy(each["name"]) for each in message["outputs"]}, size)


def make_inputs(library: Any, tensors: Tensors) -> list[Any]:
    inputs = []
    for name, array in tensors.items():
        inputs.append(library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(np.ascontiguousarray(array))
    return inputs


def make_body(tensors: Tensors, **more: Any) -> bytes:
    inputs = [
        {"name": name, "shape": array.shape, "datatype": "INT64", "data": array.ravel().tolist()}
        for name, array in tensors.items()
    ]
    return json.dumps({"inputs": inputs, **more}).encode()


def post(server: TritonServer, model: str, tensors: Tensors, **more: Any) -> tuple[int, dict[str, Any]]:
    """Post a request in JSON, as curl would; return status and reply."""
    url, body = f"http://{server.http_address}/v2/models/{model}/infer", make_body(tensors, **more)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body)) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def as_tensors(request: RankRequest) -> Tensors:
    return {"history": request.history[None], "candidates": request.candidates[None]}


def expect_refusal(server: TritonServer, protocol: str, model: str, tensors: Tensors, *words: str, **more: Any) -> None:
    """Expect INVALID_ARGUMENT with these words."""
    with pytest.raises(InferenceServerException) as caught:
        send(server, protocol, model, tensors, **more)
    assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")
    for word in words:
        assert word in caught.value.message()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_first_and_later_visits_get_the_scores_of_ranker_full(server, full, log, protocol, model):
    with make_client(server, protocol, model) as client:
        for length in (0, 1, 12, 40, 96):
            history = log.draw_history(length)
            for count, expected in ((5, MISS), (1, HIT), (64, HIT)):
                report = visit(client, full, history, log.draw_candidates(count))
                if length > 1:  # others may have been here with no event, or the same one
                    assert report.cache is expected
                assert (report.encode_seconds > 0) == (report.cache is MISS)
                # A cold user of `ranker_resident` is encoded and scored in one run.
                assert (report.fuse_seconds > 0) == (model == "ranker" or report.cache is HIT)


def correct_one(history: Ids) -> Ids:
    corrected = history.copy()
    corrected[7, 1] = 1 + corrected[7, 1] % 4
    return corrected


def swap_two(history: Ids) -> Ids:
    swapped = history.copy()
    other = next(place for place in range(2, len(history)) if (history[place] != history[1]).any())
    swapped[[1, other]] = history[[other, 1]]
    return swapped


NEW_EVENT = np.array([[7, 2]])
CHANGES: dict[str, Callable[[Ids], Ids]] = {
    "grown": lambda history: np.concatenate([history, NEW_EVENT]),
    "without its oldest event": lambda history: history[1:],
    "moved on by one event": lambda history: np.concatenate([history[1:], NEW_EVENT]),
    "with one event corrected": correct_one,
    "with two events swapped": swap_two,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_history_is_a_miss_and_the_old_entry_stays(server, full, log, protocol, model, change):
    history, candidates = log.draw_history(30), log.draw_candidates(12)
    changed = CHANGES[change](history)
    with make_client(server, protocol, model) as client:
        seen = [visit(client, full, each, candidates).cache for each in (history, history, changed, changed, history)]
        assert seen == [MISS, HIT, MISS, HIT, HIT]
        # Padding is no change, wherever it stands.
        padded = np.insert(changed, [0, 3, 3, len(changed)], 0, axis=0)
        assert visit(client, full, padded, candidates).cache is HIT
    difference = full.rank(history, candidates).scores - full.rank(changed, candidates).scores
    assert np.abs(difference).max() > 3 * TOLERANCE, "stale KV would have been noticed"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_concurrent_returning_and_changing_users_get_their_own_scores(server, full, log, protocol, model):
    """Hits and misses at once: each history is encoded once."""
    histories = []
    for length in (12, 25, 33, 60, 95):
        history = log.draw_history(length)
        histories += [history, *(change(history) for change in CHANGES.values())]
    meter = Meter(server, CACHED_BY[model])
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(histories)), 4))
    requests = [RankRequest(histories[place], log.draw_candidates(1 + int(place) % 9)) for place in order]
    with make_client(server, protocol, model) as client, ThreadPoolExecutor(8) as pool:
        rankings = list(pool.map(lambda each: client.rank(each.history, each.candidates, report=True), requests))
        expected = list(pool.map(lambda each: full.rank(each.history, each.candidates).scores, requests))
    for ranking, scores in zip(rankings, expected, strict=True):
        np.testing.assert_allclose(ranking.scores, scores, rtol=0, atol=TOLERANCE)
    caches = Counter(ranking.report.cache for ranking in rankings)
    assert caches == {MISS: len(histories), HIT: 3 * len(histories)}
    assert meter("user_kv_misses_total") == len(histories)
    assert meter("user_kv_hits_total") == 3 * len(histories)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_a_request_of_several_users_reports_hit_or_miss_of_each(server, full, log, protocol, model):
    users = [log.draw_history(length) for length in (20, 11, 20)]
    candidates = np.stack([log.draw_candidates(6) for _ in range(4)])
    with make_client(server, protocol, model) as client:
        visit(client, full, users[0], candidates[0])
    padded = [np.insert(user, [0] * (20 - len(user)), 0, axis=0) for user in users]
    history = np.stack([*padded, padded[1]])  # the last user is the second one again
    outputs = ["scores", "encode_report", "fuse_report"]
    tensors = {"history": history, "candidates": candidates}
    for expected in ([HIT, MISS, MISS, HIT], [HIT] * 4):
        reply = send(server, protocol, model, tensors, outputs, {"kvcast_report": True}).outputs
        parts = zip(reply["encode_report"][:, 0], reply["fuse_report"][:, 0], strict=True)
        assert [Report.merge(*(text.decode() for text in part)).cache for part in parts] == expected
        for row in range(4):
            expect_right(full, history[row], candidates[row], reply["scores"][row])


@pytest.mark.parametrize("model", MODELS)
def test_a_cached_user_among_new_ones_gets_the_right_scores(server, full, log, model):
    """All at once over one connection, so that they wait together."""
    kept = log.draw_request(30, 8)
    new = [log.draw_request(length, 5) for length in (96, 95, 70, 20, 20, 7)]
    with make_client(server, "grpc", model) as client:
        visit(client, full, kept.history, kept.candidates)
    requests = [*new, kept, new[0], kept, new[0]]
    outputs = ["scores", "encode_report"]
    replies: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(server.grpc_address)) as connection:
        names = [tritonclient.grpc.InferRequestedOutput(name) for name in outputs]
        for index, request in enumerate(requests):
            connection.async_infer(
                model,
                make_inputs(tritonclient.grpc, as_tensors(request)),
                lambda result, error, index=index: replies.put((index, result, error)),
                outputs=names,
                parameters={"kvcast_report": True},
            )
        answered = [replies.get(timeout=60) for _ in requests]
    assert sorted(index for index, _, _ in answered) == list(range(len(requests)))
    caches: dict[int, CacheResult] = {}
    for index, result, error in answered:
        assert error is None
        request = requests[index]
        expect_right(full, request.history, request.candidates, result.as_numpy("scores")[0])
        caches[index] = Report.merge(result.as_numpy("encode_report")[0, 0].decode()).cache
    assert [caches[index] for index in (1, 2, 3, 4, 5)] == [MISS] * 5
    assert [caches[index] for index in (6, 8)] == [HIT] * 2
    assert sorted(caches[index] for index in (0, 7, 9)) == [HIT, HIT, MISS], "the same user three times, encoded once"


@pytest.mark.parametrize("model", MODELS)
def test_closed_connections_do_not_affect_other_requests(server, full, log, model):
    requests = [log.draw_request(60 + index, 20) for index in range(12)]
    for index, request in enumerate(requests[:6]):
        with contextlib.closing(tritonclient.grpc.InferenceServerClient(server.grpc_address)) as connection:
            inputs = make_inputs(tritonclient.grpc, as_tensors(request))
            call = connection.async_infer(model, inputs, lambda result, error: None)
            time.sleep(0.001 * index)  # before, while and after it is computed
            call.cancel()
    for index, request in enumerate(requests[6:]):
        body = make_body(as_tensors(request))
        head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(server.http_address.split(":")) as connection:
            # Every other one hangs up in the middle of the request.
            connection.sendall(head + (body if index % 2 else body[: len(body) // 2]))
            time.sleep(0.001 * index)
    with make_client(server, "grpc", model) as client:
        for request in requests:
            assert visit(client, full, request.history, request.candidates).cache is not OFF
            assert visit(client, full, request.history, request.candidates).cache is HIT


@pytest.mark.parametrize("model", [*MODELS, "ranker_full"])
def test_a_reply_holds_only_scores_by_default(server, full, log, model):
    request = log.draw_request(15, 4)
    for more in (
        {},
        {"parameters": {"kvcast_report": False}},
        {"parameters": {"trace": "abc", "page": 2, "new": True}},
    ):
        status, reply = post(server, model, as_tensors(request), **more)
        assert status == 200
        (output,) = reply["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("scores", "FP32", [1, 4])
        expect_right(full, request.history, request.candidates, np.array(output["data"], np.float32))
    raw = send(server, "grpc", model, as_tensors(request))
    assert list(raw.outputs) == ["scores"]
    expect_right(full, request.history, request.candidates, raw.outputs["scores"][0])


@pytest.mark.parametrize("model", MODELS)
def test_the_report_comes_with_the_scores_if_the_parameter_asks_for_it(server, full, log, model):
    request = log.draw_request(15, 4)
    status, reply = post(server, model, as_tensors(request), parameters={"kvcast_report": True})
    assert status == 200
    outputs = {output["name"]: output for output in reply["outputs"]}
    assert set(outputs) == {"scores", "encode_report", "fuse_report"}
    expect_right(full, request.history, request.candidates, np.array(outputs["scores"]["data"], np.float32))
    for name in ("encode_report", "fuse_report"):
        assert (outputs[name]["datatype"], outputs[name]["shape"]) == ("BYTES", [1, 1])
    assert Report.merge(*outputs["encode_report"]["data"], *outputs["fuse_report"]["data"]).cache is MISS
    raw = send(server, "grpc", model, as_tensors(request), parameters={"kvcast_report": True})
    assert set(raw.outputs) == set(outputs)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", [*MODELS, "ranker_full"])
@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("kvcast_raport", True),
        ("kvcast_", False),
        ("kvcast_report", 1),
        ("kvcast_report", "true"),
        ("kvcast_prefetch", 1),
        ("kvcast_prefetch", "yes"),
    ],
)
def test_an_invalid_kvcast_parameter_is_reported_by_name(server, full, log, protocol, model, parameter, value):
    request = log.draw_request(15, 4)
    expect_refusal(server, protocol, model, as_tensors(request), parameter, parameters={parameter: value})
    if model in MODELS:
        with make_client(server, protocol, model) as client:
            assert visit(client, full, request.history, request.candidates).cache is MISS


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_a_prefetched_user_is_a_hit(server, full, log, protocol, model):
    history = log.draw_history(44)
    with make_client(server, protocol, model) as client:
        first, second = client.prefetch(history), client.prefetch(np.insert(history, 5, 0, axis=0))
        assert (first.cache, second.cache) == (MISS, HIT)
        assert first.encode_seconds > 0 == second.encode_seconds
        assert visit(client, full, history, log.draw_candidates(9)).cache is HIT
        empty = client.prefetch([])
        assert empty.cache in (HIT, MISS)
        assert visit(client, full, np.zeros((0, 2), np.int64), log.draw_candidates(3)).cache is HIT


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_asyncio_prefetches_at_once_encode_once(server, full, log, protocol, model):
    request = log.draw_request(51, 6)

    async def prefetch_and_rank() -> tuple[list[Report], Any]:
        async with AsyncRankerClient(address_of(server, protocol), protocol=protocol, model=model) as client:
            await client.get_manifest()
            reports = await asyncio.gather(*(client.prefetch(request.history) for _ in range(6)))
            return reports, await client.rank(request.history, request.candidates, report=True)

    reports, ranking = asyncio.run(prefetch_and_rank())
    assert sorted(report.cache for report in reports) == [HIT] * 5 + [MISS]
    assert ranking.report.cache is HIT
    expect_right(full, request.history, request.candidates, ranking.scores)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_the_command_line_prefetches(server, log, tmp_path, capsys, protocol, model):
    requests = [log.draw_request(length, 4) for length in (31, 32)]
    arguments = ["--protocol", protocol, "--address", address_of(server, protocol), "--model", model]
    for place, request in enumerate(requests):
        path = tmp_path / f"{place}.json"
        path.write_text(request.to_json(CONFIG.schema))
    said = []
    for _ in range(2):
        assert main([str(tmp_path / "0.json"), "--prefetch", "--json", *arguments]) == 0
        said.append(json.loads(capsys.readouterr().out)["cache"])
        assert main([str(tmp_path / "1.json"), "--prefetch", *arguments]) == 0
        said.append(capsys.readouterr().out.strip())
    assert said[::2] == ["miss", "hit"]
    assert re.fullmatch(r"32 events encoded in \d+\.\d ms and cached", said[1])
    assert said[3] == "32 events were cached already"
    assert main([str(tmp_path / "1.json"), "--report", "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["cache"] == "hit"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_several_users_are_prefetched_by_one_request(server, full, log, protocol, model):
    histories = np.stack([log.draw_history(20) for _ in range(3)])
    with make_client(server, protocol, model) as client:
        call = Conversation(client.get_manifest(), model).ask_prefetch(histories[0])
        tensors = {name: np.repeat(array, 3, axis=0) for name, array in call.inputs.items()} | {"history": histories}
        raw = send(server, protocol, call.model, tensors, list(call.outputs), dict(call.parameters))
        assert [Report.merge(text.decode()).cache for text in raw.outputs["encode_report"][:, 0]] == [MISS] * 3
        for history in histories:
            assert visit(client, full, history, log.draw_candidates(5)).cache is HIT


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_no_kv_crosses_the_wire_for_a_prefetch(server, log, protocol, model):
    with make_client(server, protocol, model) as client:
        manifest = client.get_manifest()
    call = Conversation(manifest, model).ask_prefetch(log.draw_history(96))
    raw = send(server, protocol, call.model, dict(call.inputs), list(call.outputs), dict(call.parameters))
    assert set(raw.outputs) == set(call.outputs)
    assert set(raw.outputs) <= {"kv_id", "encode_report"}
    assert raw.size < 1000 < manifest.user_kv.bytes_of(96) / 50


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_no_candidates_without_the_parameter_is_a_wrong_request(server, log, protocol, model):
    request = log.draw_request(20, 5)
    nothing = {**as_tensors(request), "candidates": request.candidates[None, :0]}
    expect_refusal(server, protocol, model, nothing, "candidates", "N = 1 to 64", "got 0")
    expect_refusal(server, protocol, model, nothing, "got 0", parameters={"kvcast_prefetch": False})
    with make_client(server, protocol, model) as client, pytest.raises(InvalidRequestError, match="got 0"):
        client.rank(request.history, request.candidates[:0])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_candidates_in_a_prefetch_are_rejected_and_nothing_is_cached(server, full, log, protocol):
    request = log.draw_request(20, 5)
    words = ("candidates", "N = 0", "prefetch", "got 5")
    expect_refusal(
        server, protocol, "ranker_resident", as_tensors(request), *words, parameters={"kvcast_prefetch": True}
    )
    with make_client(server, protocol, "ranker_resident") as client:
        assert visit(client, full, request.history, request.candidates).cache is MISS


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_a_wrong_history_in_a_prefetch_is_a_wrong_request(server, log, protocol, model):
    history = log.draw_history(20)
    wrong = {
        "'item' within 0..499": history + 500,
        "at most L = 96": np.ones((97, 2), np.int64),
        "2 fields": history[:, :1],
        "history": history.astype(np.float32),
    }
    with make_client(server, protocol, model) as client:
        manifest = client.get_manifest()
        call = Conversation(manifest, model).ask_prefetch(history)
        for words, each in wrong.items():
            with pytest.raises(InvalidRequestError, match="history"):
                client.prefetch(each)
            tensors = {**call.inputs, "history": each[None]}
            expect_refusal(
                server,
                protocol,
                call.model,
                tensors,
                words,
                outputs=list(call.outputs),
                parameters=dict(call.parameters),
            )
        assert client.prefetch(history).cache is MISS


def test_prefetching_a_model_without_a_cache_is_an_error(server, log, tmp_path, capsys):
    request = log.draw_request(10, 3)
    with make_client(server, "grpc", "ranker_full") as client, pytest.raises(ValueError, match="'ranker_full'"):
        client.prefetch(request.history)

    async def prefetch() -> None:
        async with AsyncRankerClient(server.grpc_address, model="ranker_full") as client:
            await client.prefetch(request.history)

    with pytest.raises(ValueError, match="'ranker_full'"):
        asyncio.run(prefetch())
    path = tmp_path / "request.json"
    path.write_text(request.to_json(CONFIG.schema))
    assert main([str(path), "--prefetch", "--address", server.grpc_address, "--model", "ranker_full"]) == 2
    assert "expected model ranker or ranker_resident, got 'ranker_full'" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", MODELS)
def test_without_a_cache_every_visit_is_computed_and_a_prefetch_is_not(off, full, log, protocol, model):
    history, meter = log.draw_history(LENGTH), Meter(off, CACHED_BY[model])
    with make_client(off, protocol, model) as client:
        for _ in range(3):
            report = visit(client, full, history, log.draw_candidates(7))
            assert report.cache is OFF
            assert report.encode_seconds > 0
        assert meter("encode_seconds_count") == 3
        assert client.prefetch(history) == Report(OFF)
        assert meter("encode_seconds_count") == 3
    for name in ("user_kv_hits_total", "user_kv_misses_total", "user_kv_bytes", "user_kv_entries"):
        assert meter.show(name) == 0
    assert meter.show("user_kv_budget_bytes") == 0


@pytest.mark.parametrize("model", MODELS)
def test_an_entry_larger_than_the_budget_is_never_cached(narrow, full, log, model):
    history, meter = log.draw_history(LENGTH), Meter(narrow, CACHED_BY[model])
    with make_client(narrow, "grpc", model) as client:
        assert [visit(client, full, history, log.draw_candidates(7)).cache for _ in range(3)] == [MISS] * 3
        assert client.prefetch(history) == Report(OFF)
        assert meter("user_kv_refused_total") == meter("encode_seconds_count") == 3
        assert meter("user_kv_hits_total") == meter("user_kv_entries") == 0
        # A shorter history fits.
        short = log.draw_history(6)
        assert [visit(client, full, short, log.draw_candidates(7)).cache for _ in range(2)] == [MISS, HIT]
    assert 0 < meter.show("user_kv_bytes") <= meter.show("user_kv_budget_bytes")


@pytest.mark.parametrize("model", MODELS)
def test_expired_entries_are_encoded_again(fleeting, full, log, model):
    meter = Meter(fleeting, CACHED_BY[model])
    with make_client(fleeting, "grpc", model) as client:
        for _ in range(20):  # on a busy machine the second visit can come too late
            history, started = log.draw_history(LENGTH), time.monotonic()
            caches = [client.rank(history, log.draw_candidates(3), report=True).report.cache for _ in range(2)]
            if time.monotonic() - started < 1:
                break
        assert caches == [MISS, HIT]
        time.sleep(1.2)
        assert visit(client, full, history, log.draw_candidates(7)).cache is MISS
    assert meter("user_kv_expirations_total") >= 1


@pytest.mark.parametrize("model", MODELS)
def test_a_trace_against_a_small_budget_keeps_the_most_recent_users(small, full, log, model):
    """Against a model of the cache in three lines, visit by visit."""
    users = [log.draw_history(LENGTH) for _ in range(ROOM + 4)]
    generator = np.random.default_rng(3)
    meter = Meter(small, CACHED_BY[model])
    kept: OrderedDict[int, None] = OrderedDict()
    hits = evictions = 0
    with make_client(small, "grpc", model) as client:
        for user in generator.integers(0, len(users), 80):
            is_kept = user in kept
            kept[user] = None
            kept.move_to_end(user)
            if len(kept) > ROOM:
                kept.popitem(last=False)
                evictions += 1
            hits += is_kept
            report = visit(client, full, users[user], log.draw_candidates(4))
            assert report.cache is (HIT if is_kept else MISS)
            assert meter.show("user_kv_bytes") <= meter.show("user_kv_budget_bytes")
    assert evictions > 10
    # The ensemble ran its golden request at the start: one more entry, evicted since.
    assert meter("user_kv_evictions_total") == evictions + (model == "ranker")
    assert meter("user_kv_hits_total") == hits
    assert meter("user_kv_misses_total") == meter("encode_seconds_count") == 80 - hits
    assert meter.show("user_kv_entries") == ROOM
    assert meter("user_kv_refused_total") == meter("user_kv_failed_total") == 0


@pytest.mark.parametrize("model", MODELS)
def test_a_thousand_users_in_quick_succession_stay_within_a_small_budget(fleeting, full, log, model):
    """Histories of all lengths, which also expire; every tenth user returns at once."""
    lengths = np.random.default_rng(1).integers(2, 97, 1000)
    requests = [log.draw_request(int(length), 1 + int(length) % 10) for length in lengths]
    meter, is_over, peaks = Meter(fleeting, CACHED_BY[model]), threading.Event(), []

    def watch() -> None:
        while not is_over.is_set():
            peaks.append(meter.show("user_kv_bytes"))
            is_over.wait(0.02)

    def work(place: int) -> dict[int, Ids]:
        """Rank every eighth request."""
        scores = {}
        with make_client(fleeting, "grpc", model) as client:
            for index in range(place, len(requests), 8):
                for _ in range(2 if index % 10 == 0 else 1):
                    scores[index] = client.rank(requests[index].history, requests[index].candidates).scores
        return scores

    with ThreadPoolExecutor(9) as pool:
        watching = pool.submit(watch)
        try:
            scores = {index: each for part in pool.map(work, range(8)) for index, each in part.items()}
        finally:
            is_over.set()
        watching.result()
    assert len(scores) == 1000
    for index in range(0, 1000, 20):
        expect_right(full, requests[index].history, requests[index].candidates, scores[index])
    assert len(peaks) > 10
    assert 0 < max(peaks) <= meter.show("user_kv_budget_bytes")
    assert meter("user_kv_hits_total") + meter("user_kv_misses_total") == 1100
    assert meter("user_kv_evictions_total") + meter("user_kv_expirations_total") > 500
    assert meter("user_kv_failed_total") == 0
    gone = sum(meter.show(f"user_kv_{name}_total") for name in ("evictions", "expirations", "refused", "failed"))
    assert meter.show("user_kv_entries") == meter.show("user_kv_misses_total") - gone


def draw_trace(log: ClickLog, visits: int) -> list[Ids]:
    """Draw histories of new users, of returning users, and of returning users with a changed history."""
    generator, histories, changes = np.random.default_rng(2), [log.draw_history(20)], list(CHANGES.values())
    for _ in range(visits - 1):
        kind, known = generator.random(), histories[generator.integers(len(histories))]
        if kind < 0.2:
            histories.append(log.draw_history(int(generator.integers(12, 60))))
        elif kind < 0.5 and len(known) > 12:
            histories.append(changes[generator.integers(len(changes))](known))
        else:
            histories.append(known)
    return histories


@pytest.mark.parametrize("model", MODELS)
def test_the_metrics_count_what_a_trace_does(server, full, log, model):
    cache, fusion = Meter(server, CACHED_BY[model]), Meter(server, FUSED_BY[model])
    layout = full.get_manifest().user_kv
    seen: dict[bytes, int] = {}
    reports, ranked, warm, prefetches = [], 0, 0, 0
    with make_client(server, "grpc", model) as client:
        client.get_manifest()  # which waits for its turn, too
        waits = Meter(server, CACHED_BY[model])
        for index, history in enumerate(draw_trace(log, 60)):
            is_kept = history.tobytes() in seen
            seen[history.tobytes()] = layout.bytes_of(len(history))
            if index % 5 == 4:
                prefetches += 1
                reports.append(client.prefetch(history))
            else:
                ranked += 1
                warm += is_kept
                reports.append(client.rank(history, log.draw_candidates(5), report=True).report)
            assert reports[-1].cache is (HIT if is_kept else MISS)
            # A reply leaves after it was counted.
            assert cache("user_kv_hits_total") + cache("user_kv_misses_total") == index + 1
    assert 10 < len(seen) < 50
    assert cache("user_kv_misses_total") == cache("encode_seconds_count") == cache("user_kv_entries") == len(seen)
    assert cache("user_kv_hits_total") == 60 - len(seen)
    assert fusion("fuse_seconds_count") == (ranked if model == "ranker" else warm)
    assert waits("wait_seconds_count") == 60
    for meter, stage in ((cache, "encode"), (fusion, "fuse")):
        reported = sum(getattr(report, f"{stage}_seconds") for report in reports)
        assert meter(f"{stage}_seconds_sum") == pytest.approx(reported, rel=1e-3)
    assert sum(seen.values()) < cache("user_kv_bytes") < sum(seen.values()) + len(seen) * ENTRY_OVERHEAD
    assert cache.show("user_kv_bytes") <= cache.show("user_kv_budget_bytes") == 512e6
    assert cache.show("waiting_requests") == 0
    for name in ("evictions", "expirations", "refused", "failed", "waits"):
        assert cache(f"user_kv_{name}_total") == 0


def test_errors_are_counted_by_code_where_they_were_made(server, log):
    """Triton's own counter takes a returned error for a success."""
    request = as_tensors(log.draw_request(20, 5))
    wrong = {**request, "history": request["history"] + 500}
    nothing = {**request, "candidates": request["candidates"][:, :0]}
    meters = {name: Meter(server, name) for name in ("user_encoder", "doc_fusion", "ranker_resident", "ranker_full")}
    name = "errors_total INVALID_ARGUMENT"
    for model, tensors, counted_by in (
        ("ranker", wrong, "user_encoder"),
        ("ranker", nothing, "doc_fusion"),
        ("ranker_resident", wrong, "ranker_resident"),
        ("ranker_resident", nothing, "ranker_resident"),
        ("ranker_full", wrong, "ranker_full"),
    ):
        before = {each: meter(name) for each, meter in meters.items()}
        for protocol in PROTOCOLS:
            expect_refusal(server, protocol, model, tensors, "expected")
        after = {each: meter(name) for each, meter in meters.items()}
        assert after == {**before, counted_by: before[counted_by] + 2}
    resident = meters["ranker_resident"]
    assert resident("user_kv_misses_total") == resident("encode_seconds_count") == 0
    # An error of the client's own does not reach the server.
    with make_client(server, "grpc", "ranker_resident") as client, pytest.raises(InvalidRequestError):
        client.rank([[1, 1]], [[500, 1, 1, 1]])
    assert resident(name) == 4


def test_ranker_resident_served_alone_gives_the_manifest(start, full, log, tiny_repository):
    alone = start(tiny_repository, models=["ranker_resident"])
    exported = (tiny_repository / "ranker_resident" / "1" / "manifest.json").read_text()
    request = log.draw_request(25, 5)

    async def ask(protocol: str) -> str:
        address = address_of(alone, protocol)
        async with AsyncRankerClient(address, protocol=protocol, model="ranker_resident") as client:
            return (await client.get_manifest()).to_json()

    for protocol in PROTOCOLS:
        with make_client(alone, protocol, "ranker_resident") as client:
            assert client.get_manifest().to_json() == exported
            assert client.get_manifest(refresh=True).to_json() == exported
            visit(client, full, request.history, request.candidates)
            assert client.prefetch(request.history).cache is HIT
        assert asyncio.run(ask(protocol)) == exported
    status, reply = post(
        alone, "ranker_resident", as_tensors(request), outputs=[{"name": "scores"}, {"name": "encode_report"}],
        parameters={"kvcast_report": True},
    )  # fmt: skip
    assert status == 200
    assert {output["name"] for output in reply["outputs"]} == {"scores", "encode_report"}


def test_a_server_without_metrics_answers_too(start, full, log, tiny_repository):
    silent = start(tiny_repository, extra_flags=["--allow-metrics=false"])
    for model in MODELS:
        request = log.draw_request(25, 5)
        with make_client(silent, "grpc", model) as client:
            assert client.prefetch(request.history).cache is MISS
            for _ in range(3):
                assert visit(client, full, request.history, request.candidates).cache is HIT
            with pytest.raises(InvalidRequestError):
                client.rank(request.history, request.candidates[:0])
        expect_refusal(silent, "grpc", model, {**as_tensors(request), "history": np.full((1, 1, 2), -1)}, "got -1")
        status, _ = post(silent, model, as_tensors(request))
        assert status == 200
    with urllib.request.urlopen(f"http://{silent.metrics_address}/metrics", timeout=5) as page:
        assert b"nv_inference" not in page.read(), "the gateway's own metrics are there all the same"


@pytest.fixture(scope="module")
def new_release(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository exported again: the same features, other weights, and a family that leaves `rank` as it comes."""
    repository = Path(shutil.copytree(tiny_repository, tmp_path_factory.mktemp("new") / "repository"))
    family = f"{RanksInTwoCalls.__module__}:{RanksInTwoCalls.__name__}"
    network = dataclasses.replace(CONFIG.network, family=family, layers=1)  # sooner exported than three
    config = dataclasses.replace(CONFIG, network=network)
    export_release(config, WeightsSource(seed=1), repository, say=lambda _: None)
    return repository


def test_the_graphs_of_a_family_that_leaves_rank_as_it_comes_are_proved(new_release, tmp_path):
    for model in EXPORTED_MODELS:
        (tmp_path / model.name).symlink_to(new_release / model.name / "1")
    manifest, calls = read_manifest(new_release / "ranker_resident" / "1"), OnnxCalls.open(tmp_path)
    for length, count, seed in ((50, 7, 11), (2, 3, 12)):
        assert 0 <= prove(calls, draw_sample(CONFIG.schema, length, count, seed), manifest.user_kv) <= TOLERANCE


def test_a_new_release_starts_with_an_empty_cache_and_its_own_scores(server, start, full, log, new_release):
    request, renewed = log.draw_request(40, 12), start(new_release)
    with make_client(renewed, "grpc", "ranker_full") as own_full:
        expected = own_full.rank(request.history, request.candidates).scores
        for model in MODELS:
            with make_client(server, "grpc", model) as client:
                caches = [visit(client, full, request.history, request.candidates).cache for _ in range(2)]
                assert caches == [MISS, HIT]
                before = client.get_manifest().release
            with make_client(renewed, "grpc", model) as client:
                assert client.get_manifest().release != before
                caches = [visit(client, own_full, request.history, request.candidates).cache for _ in range(2)]
                assert caches == [MISS, HIT]
    difference = expected - full.rank(request.history, request.candidates).scores
    assert np.abs(difference).max() > 1e-2
