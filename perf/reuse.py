"""The experiments on the user KV cache: hits against misses, and a trace of returning users.

They compare ways to serve the same requests: no cache, the ensemble with its encoder's cache, and `ranker_resident`.
Every way has a server of its own, idle while another has its turn.
"""

import contextlib
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from kvcast.client import NO_RETRIES, CacheResult, RankerClient, Ranking
from kvcast.protocol.request import RankRequest
from kvcast.protocol.tensors import RANKER, RANKER_RESIDENT, SCORE_TOLERANCE
from kvcast.server import TritonServer
from kvcast.serving.user_kv_cache import Arrays, UserKVCache
from kvcast.synthetic import ClickLog, Trace, Traffic, Visit, write_perf_input
from perf.analyzer import Load, PerfError, run_analyzer
from perf.baselines.race import Worker, start_workers
from perf.harness import Harness, Record
from perf.processes import Counters, read_model_memory
from perf.soak import CACHED_BY, MODELS

REUSE_COUNTS, QUICK_REUSE_COUNTS = (10, 50, 100), (50,)
BUDGETS, QUICK_BUDGETS = (8, 32, 128), (32,)  # users of the expected history that fit
VISITS, QUICK_VISITS = 800, 120
IN_FLIGHT = 4
# Visits before the next way of serving has its turn: this machine's speed drifts.
VISITS_PER_TURN = 40
BOOKKEEPING_CALLS = 300


# ---- warm against cold ----------------------------------------------------------------------------------------------


def run_reuse(harness: Harness) -> Record:
    """Cold and warm, ensemble and resident, and the bare fusion run beside them, in turn."""
    plan, history, rows = harness.plan, harness.config.workload.history, []
    counts = plan.counts or harness.choose(REUSE_COUNTS, QUICK_REUSE_COUNTS)
    log = ClickLog(harness.config.schema, seed=77)
    with (
        harness.serve(MODELS, megabytes=harness.count_megabytes(plan.requests + 2)) as server,
        start_workers(["shared"], harness.field) as (worker,),
        tempfile.TemporaryDirectory() as folder,
    ):
        memory = read_model_memory(server)
        for count in harness.keep_served(counts):
            rounds = []
            for _ in range(plan.rounds):
                requests = [log.draw_request(history, count) for _ in range(plan.requests)]
                rounds.append(measure_round(server, requests, Path(folder) / "data.json", worker))
            row = summarise_rounds(rounds)
            rows.append({"history": history, "candidates": count, "rounds": rounds, **row})
            times = ("cold_ranker", "warm_ranker", "cold_ranker_resident", "warm_ranker_resident", "bare_fuse")
            said = ", ".join(f"{name.replace('_', ' ')} {1e3 * row[name]:.1f} ms" for name in times)
            harness.say(f"    N={count}: {said}")
    return {"rows": rows, "process_bytes": memory, "bookkeeping_seconds": measure_bookkeeping(harness)}


def measure_round(
    server: TritonServer, requests: Sequence[RankRequest], data: Path, worker: Worker
) -> dict[str, float]:
    """Send the same new users twice to each model; return median seconds of the first and of the second time."""
    write_perf_input(requests, data)
    seconds: dict[str, float] = {}
    for state in ("cold", "warm"):
        for model, cached_by in CACHED_BY.items():
            before = Counters(server.metrics_address)
            seconds[f"{state}_{model}"] = run_analyzer(model, server.grpc_address, data, Load(len(requests))).p50
            after = Counters(server.metrics_address)
            metrics = [f"kvcast_user_kv_{name}_total" for name in ("hits", "misses")]
            hits, misses = (after.get(cached_by, metric) - before.get(cached_by, metric) for metric in metrics)
            # The analyzer may send a request more than once; it may not leave one out.
            if (state == "cold" and misses < len(requests)) or (state == "warm" and misses):
                raise PerfError(
                    f"{state} {model}: expected {len(requests)} different users, got {hits} hits, {misses} misses"
                )
    history, candidates = len(requests[0].history), len(requests[0].candidates)
    bare = [worker.ask(history, candidates, seed=5)["fuse"] for _ in range(max(5, len(requests) // 3))]
    return seconds | {"bare_fuse": statistics.median(bare[1:])}


def summarise_rounds(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the medians, and the medians of ratios of neighbours."""
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ratios = {
        "warm_resident_to_cold_ranker": ("warm_ranker_resident", "cold_ranker"),
        "cold_resident_to_cold_ranker": ("cold_ranker_resident", "cold_ranker"),
        "warm_ranker_to_cold_ranker": ("warm_ranker", "cold_ranker"),
        "warm_resident_to_bare_fuse": ("warm_ranker_resident", "bare_fuse"),
    }
    return medians | {
        name: statistics.median(each[above] / each[below] for each in rounds) for name, (above, below) in ratios.items()
    }


def measure_bookkeeping(harness: Harness) -> dict[str, float]:
    """Median seconds that the cache itself takes a user, in a full cache: key, look-up, eviction, room; no encoding."""
    manifest, length = harness.manifest, harness.config.workload.history
    layout, budget = manifest.user_kv, int(1e6 * harness.count_megabytes(8))
    shapes = [(1, *layout.keys_shape(length)[1:])] * layout.layers + [
        (1, *layout.values_shape(length)[1:])
    ] * layout.layers
    cache = UserKVCache(manifest.kv_id, lambda _: shapes, budget)
    log = ClickLog(harness.config.schema, seed=3)
    spent: dict[str, list[float]] = {"hit": [], "miss": []}

    def keep(places: list[int], spaces: list[Arrays | None]) -> list[Arrays]:  # noqa: ARG001 one user at a time
        return [space for space in spaces if space is not None]

    history = log.draw_history(length)
    for call in range(BOOKKEEPING_CALLS):
        history = np.roll(history, 1, axis=0)
        history[0, 0] = 1 + call  # another user
        for state in ("miss", "hit"):
            started = time.perf_counter()
            cache.fetch([history], keep)
            spent[state].append(time.perf_counter() - started)
    cache.check()
    return {state: statistics.median(seconds[20:]) for state, seconds in spent.items()}


# ---- a trace of returning users -------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to serve the trace, and what it has answered so far."""

    name: str
    model: str
    users: int
    client: RankerClient
    rankings: list[Ranking]
    seconds: float = 0.0

    def replay(self, visits: Sequence[Visit], pool: ThreadPoolExecutor) -> None:
        """Send visits in order, `IN_FLIGHT` at a time, and ask how it was done."""
        requests, started = [visit.request for visit in visits], time.perf_counter()
        self.rankings += pool.map(lambda each: self.client.rank(each.history, each.candidates, report=True), requests)
        self.seconds += time.perf_counter() - started

    def check_scores(self, reference: "Way") -> None:
        """Compare all scores with another's.

        Raises:
            PerfError: some differ.
        """
        for visit, (expected, got) in enumerate(zip(reference.rankings, self.rankings, strict=True)):
            difference = float(np.abs(expected.scores - got.scores).max())
            if not difference <= SCORE_TOLERANCE:
                raise PerfError(f"{self.name}, {self.users} users: scores of visit {visit} differ by {difference:.1e}")


def run_trace(harness: Harness) -> Record:
    """Replay the same visits on every way of serving, in turn; compare their scores, too."""
    workload, visits = harness.config.workload, harness.choose(VISITS, QUICK_VISITS)
    traffic = Traffic(workload.history, workload.candidates, shortest=max(1, workload.history // 2))
    trace = list(islice(Trace(ClickLog(harness.config.schema, seed=11), traffic, seed=11), visits))
    with contextlib.ExitStack() as stack:
        ways = [open_way(harness, stack, "no cache", RANKER.name, 0)]
        for users in harness.choose(BUDGETS, QUICK_BUDGETS):
            ways.append(open_way(harness, stack, "ensemble", RANKER.name, users))
            ways.append(open_way(harness, stack, "resident", RANKER_RESIDENT.name, users))
        pool = stack.enter_context(ThreadPoolExecutor(IN_FLIGHT))
        for first in range(0, visits, VISITS_PER_TURN):
            for way in ways:
                way.replay(trace[first : first + VISITS_PER_TURN], pool)
            harness.say(f"    {min(visits, first + VISITS_PER_TURN)} of {visits} visits on {len(ways)} servers")
    for way in ways[1:]:
        way.check_scores(ways[0])
    rows = [summarise_way(harness, way, trace) for way in ways]
    return {"rows": rows, "visits": visits, "in_flight": IN_FLIGHT, "traffic": traffic}


def open_way(harness: Harness, stack: contextlib.ExitStack, name: str, model: str, users: int) -> Way:
    """Start a server with a cache for so many users (0: off), and connect."""
    server = stack.enter_context(harness.serve([model], megabytes=harness.count_megabytes(users)))
    client = stack.enter_context(RankerClient(server.grpc_address, model=model, deadline=600, retry=NO_RETRIES))
    client.get_manifest()
    return Way(name, model, users, client, [])


def summarise_way(harness: Harness, way: Way, trace: Sequence[Visit]) -> Record:
    """Return hit rate (and what a perfect LRU of that budget would have), latency and throughput."""
    seconds = np.array([ranking.seconds for ranking in way.rankings])
    hits = sum(ranking.report is not None and ranking.report.cache == CacheResult.HIT for ranking in way.rankings)
    budget = 1e6 * harness.count_megabytes(way.users)
    p50, p99 = (float(np.percentile(seconds, percent)) for percent in (50, 99))
    harness.say(
        f"    {way.name}, room for {way.users} users: {100 * hits / len(trace):.0f}% hits, "
        f"p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms, {len(trace) / way.seconds:.1f}/s"
    )
    return {
        "way": way.name,
        "model": way.model,
        "users": way.users,
        "budget_bytes": budget,
        "hit_rate": hits / len(trace),
        "expected_hit_rate": simulate_lru(trace, harness.manifest.user_kv.bytes_of, budget) / len(trace),
        "p50": p50,
        "p99": p99,
        "throughput": len(trace) / way.seconds,
    }


def simulate_lru(trace: Sequence[Visit], bytes_of: Callable[[int], int], budget: float) -> int:
    """Return the hits of a plain LRU by content, one request after the other."""
    cached: OrderedDict[bytes, int] = OrderedDict()
    hits = 0
    for visit in trace:
        key = visit.request.history.tobytes()
        if key in cached:
            hits += 1
            cached.move_to_end(key)
            continue
        size = bytes_of(len(visit.request.history))
        if size > budget:
            continue
        while sum(cached.values()) + size > budget:
            cached.popitem(last=False)
        cached[key] = size
    return hits
