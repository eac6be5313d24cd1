"""Thousands of hostile requests to a real server, through its gateway, over HTTP and over gRPC.

Every process lives on, no answer blames the server or shows its inside, and a valid request in between gets its scores.
`KVCAST_FUZZ_REQUESTS` is their number by each protocol, `KVCAST_FUZZ_SEED` the seed; a failure names its seed.
"""

import collections
import contextlib
import http.client
import os
import random
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from kvcast.server import TritonServer
from tests.chaos.fuzzing import (
    SERVICE,
    GrpcCase,
    GrpcFuzzer,
    HttpFuzzer,
    Outcome,
    Requests,
    call,
    find_fault,
    make_infer_request,
)
from tests.conftest import make_settings
from tests.processes import find_children
from tests.support import TOLERANCE

REQUESTS = int(os.environ.get("KVCAST_FUZZ_REQUESTS", "1000"))
SEED = int(os.environ.get("KVCAST_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
VALID_EVERY = 50
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Witness:
    """Says whether the server is still the one it was: the same processes, the same scores."""

    def __init__(self, server: TritonServer, channel: grpc.Channel, requests: Requests) -> None:
        self._pid, self._channel = os.getpid(), channel  # the gateway and tritonserver are children of this process
        self._messages = {
            model: make_infer_request(model, requests.tensors[model]).SerializeToString()
            for model in ("ranker", "ranker_resident", "ranker_full")
        }
        self._expected = {model: self._score(model) for model in self._messages}
        self._processes = find_children(self._pid)

    def find_harm(self, model: str) -> str | None:
        """Return what has changed."""
        processes = find_children(self._pid)
        if processes != self._processes:
            return f"processes ended: {self._processes - processes}, began: {processes - self._processes}"
        try:
            scores = self._score(model)
        except grpc.RpcError as error:
            return f"a valid request to {model} fails: {error}"
        if not np.allclose(scores, self._expected[model], rtol=0, atol=TOLERANCE):
            return f"a valid request to {model} gets {scores}, not {self._expected[model]}"
        return None

    def _score(self, model: str) -> np.ndarray:
        reply = service_pb2.ModelInferResponse.FromString(call(self._channel, "ModelInfer", self._messages[model]))
        place = next(index for index, output in enumerate(reply.outputs) if output.name == "scores")
        return np.frombuffer(reply.raw_output_contents[place], np.float32)


@pytest.fixture(scope="module")
def target(tiny_repository: Path) -> Iterator[TritonServer]:
    """A server of its own: what it suffers here is no other test's."""
    with TritonServer(make_settings(tiny_repository)) as running:
        yield running


@pytest.fixture(scope="module")
def channel(target: TritonServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(target.grpc_address, options=UNLIMITED) as channel:
        yield channel


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_hostile_requests(target, channel, protocol):
    requests = Requests.prepare(target.grpc_address)
    draw = random.Random(SEED)  # noqa: S311 to be repeated, not to be secret
    witness = Witness(target, channel, requests)
    statuses: collections.Counter[str] = collections.Counter()
    faults: dict[str, str] = {}
    recent: collections.deque[Outcome] = collections.deque(maxlen=VALID_EVERY)
    for index, outcome in enumerate(send_all(protocol, target, channel, requests, draw)):
        statuses[outcome.status] += 1
        recent.append(outcome)
        fault = find_fault(outcome)
        if fault is not None:
            faults.setdefault(f"{fault}: {outcome.status} {outcome.message[:200]!r}", describe(outcome))
        if index % VALID_EVERY == 0 or index == REQUESTS - 1:
            harm = witness.find_harm(draw.choice(["ranker", "ranker_resident", "ranker_full"]))
            assert harm is None, f"seed {SEED}: {harm}; after\n" + "\n".join(map(describe, recent))
    print(f"seed {SEED}, {REQUESTS} requests over {protocol}: {dict(statuses)}")
    assert not faults, f"seed {SEED}: " + "\n".join(f"{fault}\n  {request}" for fault, request in faults.items())


def test_cancelled_grpc_requests_end_no_process(target, channel):
    """No cancellation is passed on to Triton: tests/unit/test_grpc_proxy.py holds that; here it is the whole server."""
    requests = Requests.prepare(target.grpc_address)
    witness = Witness(target, channel, requests)
    for model, tensors in requests.tensors.items():
        message = make_infer_request(model, tensors).SerializeToString()
        channel.unary_unary(SERVICE + "ModelInfer").future(message).cancel()
        harm = witness.find_harm("ranker")
        assert harm is None, f"{model}: {harm}"


def send_all(
    protocol: str, target: TritonServer, channel: grpc.Channel, requests: Requests, draw: random.Random
) -> Iterator[Outcome]:
    """Send the cases of one protocol, one after the other."""
    if protocol == "grpc":
        grpc_fuzzer = GrpcFuzzer(requests, draw)
        for _ in range(REQUESTS):
            case: GrpcCase = grpc_fuzzer.make()
            yield case.send(channel)
        return
    http_fuzzer = HttpFuzzer(requests, draw)
    with contextlib.closing(http.client.HTTPConnection(target.http_address, timeout=30)) as connection:
        for _ in range(REQUESTS):
            yield http_fuzzer.make().send(target.http_address, connection)


def describe(outcome: Outcome) -> str:
    """Return a request in one line."""
    return f"{outcome.kind} -> {outcome.status}: {' '.join(outcome.request.split())[:500]}"
