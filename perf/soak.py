"""Memory over time: does anything grow that should not?

Endurance: ten minutes of changing users, on a server without a gateway; do the processes with a user KV cache stay
within their budget? Soak: half an hour of mixed load through the gateway: both models, both protocols, returning and
new users, prefetches, invalid requests, cancelled requests; every process is sampled.
"""

import contextlib
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcast.client import NO_RETRIES, RankerClient
from kvcast.client.address import Address, Protocol
from kvcast.client.transport import Call, Transport, open_transport
from kvcast.protocol.errors import InvalidRequestError, KvcastError, TryAgainError
from kvcast.protocol.tensors import CANDIDATES, HISTORY, RANKER, RANKER_RESIDENT, SCORE_TOLERANCE, SCORES, USER_ENCODER
from kvcast.server import TritonServer
from kvcast.synthetic import ClickLog, Trace, Traffic, Visit
from perf.harness import Harness, Record, keep_sending
from perf.processes import Counters, read_model_memory, read_shared_memory, read_uses

ENDURANCE_SECONDS, SOAK_SECONDS = 600, 1800
# Whose cache holds the users of these models.
CACHED_BY = {RANKER.name: USER_ENCODER.name, RANKER_RESIDENT.name: RANKER_RESIDENT.name}
MODELS, CACHING = list(CACHED_BY), list(CACHED_BY.values())
ENDURANCE_CALLERS, ENDURANCE_USERS = 4, 24
CALLERS = 3
CACHE_MEGABYTES = 200
COMPARED_EVERY, WRONG_EVERY, PREFETCHED_EVERY, GIVEN_UP_EVERY = 20, 25, 10, 30
HASTE_SECONDS = 0.05
# Memory settles while caches fill and allocators learn sizes; the slope is that of what comes after this share.
SETTLED_AFTER = 1 / 3


@dataclass(frozen=True)
class MemorySample:
    """Memory of the processes with a user KV cache, as the system counts it, and of their caches, as they do."""

    seconds: float
    process_bytes: dict[str, int]
    cache_bytes: dict[str, float]


@dataclass(frozen=True)
class SoakSample:
    """What every process uses, by kind, and the server's shared memory."""

    seconds: float
    processes: dict[str, dict[str, int]]
    shared_memory_bytes: int


def make_traffic(harness: Harness) -> Traffic:
    """Return traffic of histories of all lengths."""
    workload = harness.config.workload
    longest = min(2 * workload.history, harness.config.limits.history)
    return Traffic(longest, workload.candidates, shortest=1)


def draw_visits(harness: Harness, seed: int) -> Iterator[tuple[int, Visit]]:
    """Return visits without end, numbered."""
    return enumerate(Trace(ClickLog(harness.config.schema, seed), make_traffic(harness), seed))


def connect(
    server: TritonServer, stack: contextlib.ExitStack, deadline: float, *protocols: Protocol
) -> list[RankerClient]:
    """Return a client for each model over each protocol, as long as the stack is open."""
    addresses: dict[Protocol, str] = {"grpc": server.grpc_address, "http": server.http_address}
    return [
        stack.enter_context(
            RankerClient(addresses[protocol], protocol=protocol, model=model, deadline=deadline, retry=NO_RETRIES)
        )
        for model in MODELS
        for protocol in protocols
    ]


# ---- endurance ------------------------------------------------------------------------------------------------------


def run_endurance(harness: Harness) -> Record:
    """Serve a trace of histories of all lengths for minutes, and sample the memory of the processes with a cache."""
    seconds, megabytes = harness.plan.endurance, harness.count_megabytes(ENDURANCE_USERS)
    answered: list[int] = []
    with harness.serve(MODELS, megabytes=megabytes) as server, contextlib.ExitStack() as stack:
        clients = connect(server, stack, 600, "grpc")
        base = read_model_memory(server)

        def send(numbered: tuple[int, Visit]) -> None:
            turn, visit = numbered
            clients[turn % len(clients)].rank(visit.request.history, visit.request.candidates)
            answered.append(turn)

        with keep_sending(draw_visits(harness, seed=13), send, ENDURANCE_CALLERS):
            samples = harness.sample(seconds, lambda passed: sample_memory(server, passed))
        samples.append(sample_memory(server, seconds))
    most = {model: max(sample.process_bytes[model] for sample in samples) for model in CACHING}
    beyond = {model: most[model] - base[model] - 1e6 * megabytes for model in CACHING}
    said = ", ".join(f"{model} {value / 1e6:.0f} MB" for model, value in beyond.items())
    harness.say(f"    {len(answered)} requests; beyond start and budget: {said}")
    return {
        "seconds": seconds,
        "requests": len(answered),
        "budget_bytes": 1e6 * megabytes,
        "start_bytes": base,
        "beyond_budget_bytes": beyond,
        "longest_history": make_traffic(harness).history,
        "samples": samples,
    }


def sample_memory(server: TritonServer, seconds: float) -> MemorySample:
    """Return what the processes with a cache hold now."""
    counters, memory = Counters(server.metrics_address), read_model_memory(server)
    held = {model: memory[model] for model in CACHING}
    counted = {model: counters.get(model, "kvcast_user_kv_bytes") for model in CACHING}
    return MemorySample(seconds, held, counted)


# ---- soak -----------------------------------------------------------------------------------------------------------


class Callers:
    """A client for each model and protocol, and bare transports, which send what the clients would refuse."""

    def __init__(self, server: TritonServer, stack: contextlib.ExitStack) -> None:
        self._clients = connect(server, stack, 60, "grpc", "http")
        self._bare: list[Transport] = [
            open_transport(Address.parse(server.grpc_address, "grpc")),
            open_transport(Address.parse(server.http_address, "http")),
        ]
        for each in self._bare:
            stack.callback(each.close)
        self.outcomes: list[str] = []

    def send(self, numbered: tuple[int, Visit]) -> None:
        """Send one request of the mixture; record its outcome."""
        turn, visit = numbered
        is_hasty = turn % GIVEN_UP_EVERY == GIVEN_UP_EVERY - 2
        try:
            what = self._ask(turn, visit, HASTE_SECONDS if is_hasty else None)
        except TryAgainError as error:
            what = "given up" if is_hasty else f"REFUSED: {error}"
        except KvcastError as error:
            what = f"FAILED: {error}"
        self.outcomes.append(what)

    def _ask(self, turn: int, visit: Visit, deadline: float | None) -> str:
        history, candidates = visit.request.history, visit.request.candidates
        client = self._clients[turn % len(self._clients)]
        if turn % WRONG_EVERY == WRONG_EVERY - 1:
            return self._ask_wrongly(turn, history)
        if turn % PREFETCHED_EVERY == PREFETCHED_EVERY - 1:
            client.prefetch(history)
            return "prefetched"
        scores = client.rank(history, candidates, deadline=deadline).scores
        if turn % COMPARED_EVERY != COMPARED_EVERY - 2:
            return "ranked"
        other = self._clients[(turn + 2) % len(self._clients)].rank(history, candidates).scores
        return "ranked alike by both models" if np.abs(scores - other).max() <= SCORE_TOLERANCE else "WRONG"

    def _ask_wrongly(self, turn: int, history: Any) -> str:
        """Send ids that no vocabulary has."""
        inputs = {HISTORY.name: history[None], CANDIDATES.name: np.full((1, 3, 4), 2**40, np.int64)}
        try:
            self._bare[turn % 2].infer(Call(MODELS[turn % len(MODELS)], inputs, [SCORES.name]), 60)
        except InvalidRequestError:
            return "wrong request, refused"
        return "WRONG REQUEST ANSWERED"


def run_soak(harness: Harness) -> Record:
    """Serve mixed load for so long; return samples, slopes an hour, and the outcomes of the requests."""
    seconds = harness.plan.soak
    serving = harness.serve(MODELS, megabytes=CACHE_MEGABYTES, is_guarded=True)
    with serving as server, contextlib.ExitStack() as stack:
        callers = Callers(server, stack)
        with keep_sending(draw_visits(harness, seed=17), callers.send, CALLERS):
            samples = harness.sample(seconds, lambda passed: sample(server, passed))
    slopes, outcomes = find_slopes(samples), dict(Counter(callers.outcomes))
    harness.say(f"    {len(callers.outcomes)} requests: {outcomes}")
    for name, slope in slopes.items():
        harness.say(f"    {name}: {describe_slope(slope)}")
    return {"seconds": seconds, "outcomes": outcomes, "samples": samples, "slopes_an_hour": slopes}


def sample(server: TritonServer, seconds: float) -> SoakSample:
    """Return what every process uses now."""
    return SoakSample(seconds, read_uses(server), read_shared_memory(server))


def find_slopes(samples: list[SoakSample]) -> dict[str, dict[str, float]]:
    """Return the slope an hour of what each process uses, by least squares, once things have settled."""
    settled = [each for each in samples if each.seconds >= SETTLED_AFTER * samples[-1].seconds]

    def fit(values: list[float]) -> float:
        return statistics.linear_regression([each.seconds / 3600 for each in settled], values).slope

    slopes = {
        name: {kind: fit([each.processes[name][kind] for each in settled]) for kind in use}
        for name, use in samples[-1].processes.items()
    }
    return slopes | {"shared memory": {"memory_bytes": fit([each.shared_memory_bytes for each in settled])}}


def describe_slope(slope: dict[str, float]) -> str:
    """Return one line of progress."""
    parts = [f"{slope['memory_bytes'] / 1e6:+.1f} MB an hour"]
    parts += [f"{slope[kind]:+.1f} {kind}" for kind in ("files", "threads") if kind in slope]
    return ", ".join(parts)
