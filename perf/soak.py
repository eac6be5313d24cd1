"""Half an hour of mixed load on a guarded server: does anything grow that should not?

Both models, both protocols, users who return and users who do not, prefetches, wrong requests, callers who give up.
Every process is sampled: memory of its own, file handles, threads; and the server's shared memory.
"""

import contextlib
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np

from kvcast.client import NO_RETRIES, RankerClient
from kvcast.client.transport import Call, GrpcTransport, HttpTransport, Protocol, Transport
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import InvalidRequestError, KvcastError, TryAgainError
from kvcast.protocol.tensors import CANDIDATES, HISTORY, RANKER, RANKER_RESIDENT, SCORE_TOLERANCE, SCORES
from kvcast.server import ServerSettings, TritonServer
from kvcast.synthetic import ClickLog, Trace, Traffic, Visit
from perf.experiments import Row
from perf.harness import serve_own
from perf.processes import ProcessUse, read_shared_memory, read_uses

SOAK_SECONDS = 1800
CALLERS = 3
MODELS = (RANKER.name, RANKER_RESIDENT.name)
CACHE_MEGABYTES = 200
COMPARED_EVERY, WRONG_EVERY, PREFETCHED_EVERY, GIVEN_UP_EVERY = 20, 25, 10, 30
HASTE_SECONDS = 0.05
SAMPLES = 360
# Memory settles while caches fill and allocators learn sizes; the slope is that of what comes after this share.
SETTLED_AFTER = 1 / 3


def run_soak(settings: ServerSettings, config: ModelConfig, seconds: float, say: Any) -> Row:
    """Serve mixed load for so long; return samples, slopes an hour, and what came of the requests."""
    with serve_own(settings, MODELS, cache_megabytes=CACHE_MEGABYTES, is_guarded=True) as server:
        outcomes, samples = soak(server, config, seconds, say)
    slopes = find_slopes(samples)
    say(f"    {sum(outcomes.values())} requests: {dict(outcomes)}")
    for name, slope in slopes.items():
        say(f"    {name}: {describe_slope(slope)}")
    return {"seconds": seconds, "outcomes": dict(outcomes), "samples": samples, "slopes_an_hour": slopes}


def soak(server: TritonServer, config: ModelConfig, seconds: float, say: Any) -> tuple[Counter[str], list[Row]]:
    """Load and sample."""
    workload, limits = config.workload, config.limits
    traffic = Traffic(min(2 * workload.history, limits.history), workload.candidates, shortest=1)
    visits = iter(Trace(ClickLog(config.schema, seed=17), traffic, seed=17))
    outcomes: Counter[str] = Counter()
    samples: list[Row] = []
    lock, started = threading.Lock(), time.monotonic()
    ends = started + seconds
    turns = count()

    def keep_asking() -> None:
        with open_callers(server) as callers:
            while time.monotonic() < ends:
                with lock:
                    visit, turn = next(visits), next(turns)
                what = ask(callers, visit, turn)
                with lock:
                    outcomes[what] += 1

    with ThreadPoolExecutor(CALLERS) as pool:
        asking = [pool.submit(keep_asking) for _ in range(CALLERS)]
        while time.monotonic() < ends:
            samples.append(sample(server, time.monotonic() - started))
            if len(samples) % (SAMPLES // 10) == 0:
                say(f"    {samples[-1]['seconds'] / 60:.0f} min, {dict(outcomes)}")
            time.sleep(max(0.5, seconds / SAMPLES))
        for each in asking:
            each.result()
    return outcomes, samples


class Callers:
    """A client for each model and protocol, and a bare transport, which sends what the clients would refuse."""

    def __init__(self, clients: list[RankerClient], bare: list[Transport]) -> None:
        self.clients, self.bare = clients, bare


@contextlib.contextmanager
def open_callers(server: TritonServer) -> Iterator[Callers]:
    """Connect one thread's clients."""
    with contextlib.ExitStack() as stack:
        addresses: dict[Protocol, str] = {"grpc": server.grpc_address, "http": server.http_address}
        clients = [
            stack.enter_context(RankerClient(address, protocol=protocol, model=model, deadline=60, retry=NO_RETRIES))
            for model in MODELS
            for protocol, address in addresses.items()
        ]
        bare: list[Transport] = [GrpcTransport(server.grpc_address), HttpTransport(server.http_address)]
        for each in bare:
            stack.callback(each.close)
        yield Callers(clients, bare)


def ask(callers: Callers, visit: Visit, turn: int) -> str:
    """Send one request of the mixture; return what came of it."""
    history, candidates = visit.request.history, visit.request.candidates
    client = callers.clients[turn % len(callers.clients)]
    is_hasty = turn % GIVEN_UP_EVERY == GIVEN_UP_EVERY - 2
    what = "ranked"
    try:
        if turn % WRONG_EVERY == WRONG_EVERY - 1:
            what = ask_wrongly(callers, turn, history)
        elif turn % PREFETCHED_EVERY == PREFETCHED_EVERY - 1:
            client.prefetch(history)
            what = "prefetched"
        else:
            scores = client.rank(history, candidates, deadline=HASTE_SECONDS if is_hasty else None).scores
            if turn % COMPARED_EVERY == COMPARED_EVERY - 2:
                other = callers.clients[(turn + 2) % len(callers.clients)].rank(history, candidates).scores
                what = "ranked alike by both models" if np.abs(scores - other).max() <= SCORE_TOLERANCE else "WRONG"
    except TryAgainError as error:
        what = "given up" if is_hasty else f"REFUSED: {error}"
    except KvcastError as error:
        what = f"FAILED: {error}"
    return what


def ask_wrongly(callers: Callers, turn: int, history: Any) -> str:
    """Send ids that no vocabulary has."""
    wrong = np.full((1, 3, 4), 2**40, np.int64)
    try:
        inputs = {HISTORY.name: history[None], CANDIDATES.name: wrong}
        callers.bare[turn % 2].infer(Call(MODELS[turn % len(MODELS)], inputs, [SCORES.name]), 60)
    except InvalidRequestError:
        return "wrong request, refused"
    return "WRONG REQUEST ANSWERED"


def sample(server: TritonServer, seconds: float) -> Row:
    """Return what every process uses now."""
    uses = {name: vars(use) for name, use in read_uses(server).items()}
    return {"seconds": seconds, "processes": uses, "shared_memory_bytes": read_shared_memory(server)}


def find_slopes(samples: list[Row]) -> dict[str, dict[str, float]]:
    """Return the slope an hour of what each process uses, by least squares, once things have settled."""
    settled = [each for each in samples if each["seconds"] >= SETTLED_AFTER * samples[-1]["seconds"]]
    hours = [each["seconds"] / 3600 for each in settled]
    slopes: dict[str, dict[str, float]] = {}
    for name in samples[-1]["processes"]:
        slopes[name] = {
            kind: statistics.linear_regression(hours, [each["processes"][name][kind] for each in settled]).slope
            for kind in ProcessUse.__dataclass_fields__
        }
    shared = statistics.linear_regression(hours, [each["shared_memory_bytes"] for each in settled]).slope
    slopes["shared memory"] = {"memory_bytes": shared}
    return slopes


def describe_slope(slope: dict[str, float]) -> str:
    """Return one line of progress."""
    parts = [f"{slope['memory_bytes'] / 1e6:+.1f} MB an hour"]
    parts += [f"{slope[kind]:+.1f} {kind}" for kind in ("files", "threads") if kind in slope]
    return ", ".join(parts)
