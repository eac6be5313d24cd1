"""The experiments on user KV that is kept: warm against cold, a trace of returning users, memory over minutes.

They compare ways to serve the same requests: no cache, the ensemble with its encoder's cache, and `ranker_resident`.
Every way has a server of its own, idle while another has its turn.
"""

import contextlib
import statistics
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kvcast.client import NO_RETRIES, CacheResult, RankerClient, Ranking
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.manifest import read_manifest
from kvcast.protocol.tensors import RANKER, RANKER_RESIDENT, SCORE_TOLERANCE, USER_ENCODER
from kvcast.server import ServerSettings, TritonServer
from kvcast.serving.user_kv_cache import Arrays, UserKVCache
from kvcast.synthetic import ClickLog, Trace, Traffic, Visit
from perf.analyzer import Load, PerfError, run_analyzer, write_input_data
from perf.baselines.race import Field, Worker, start_workers
from perf.counters import Counters
from perf.experiments import Plan, Row
from perf.harness import serve_own
from perf.processes import read_model_memory

# Who keeps the users of whom callers ask.
KEPT_BY = {RANKER.name: USER_ENCODER.name, RANKER_RESIDENT.name: RANKER_RESIDENT.name}
REUSE_COUNTS, QUICK_REUSE_COUNTS = (10, 50, 100), (50,)
BUDGETS, QUICK_BUDGETS = (8, 32, 128), (32,)  # users of the expected history that fit
VISITS, QUICK_VISITS = 800, 120
IN_FLIGHT = 4
# Visits before the next way of serving has its turn: this machine's speed drifts.
VISITS_PER_TURN = 40
ENDURANCE_SECONDS = 600
ENDURANCE_USERS = 24
BOOKKEEPING_CALLS = 300


class Lab:
    """Starts servers on one exported repository, with caches of any size."""

    def __init__(self, settings: ServerSettings, config: ModelConfig, plan: Plan, field: Field) -> None:
        self.settings, self.config, self.plan, self.field = settings, config, plan, field
        self.manifest = read_manifest(settings.repository / USER_ENCODER.name / "1")

    def count_megabytes(self, users: float) -> float:
        """Return the cache budget that holds so many users of the expected history."""
        length, layout = self.config.workload.history, self.manifest.user_kv
        return users * 1.01 * layout.bytes_of(length) / 1e6  # 1%: the history itself, bookkeeping, rounding

    def serve(self, models: list[str], users: float) -> contextlib.AbstractContextManager[TritonServer]:
        """Serve models with a cache for so many users (0: off)."""
        return serve_own(self.settings, models, cache_megabytes=self.count_megabytes(users))


# ---- warm against cold ----------------------------------------------------------------------------------------------


def run_reuse(lab: Lab, counts: Sequence[int], say: Any) -> Row:
    """Cold and warm, ensemble and resident, and the bare fusion run beside them, in turn."""
    history, requests = lab.config.workload.history, lab.plan.requests
    log = ClickLog(lab.config.schema, seed=77)
    rows = []
    with (
        lab.serve([RANKER.name, RANKER_RESIDENT.name], users=requests + 2) as server,
        start_workers(["shared"], lab.field) as (worker,),
        tempfile.TemporaryDirectory() as folder,
    ):
        memory = read_model_memory(server)
        for count in counts:
            rounds = []
            for place in range(lab.plan.rounds):
                data = Path(folder) / f"{count}_{place}.json"
                write_input_data([log.draw_request(history, count) for _ in range(requests)], data)
                rounds.append(measure_round(server, data, requests, worker, history, count))
            rows.append({"history": history, "candidates": count, "rounds": rounds} | summarise_rounds(rounds))
            say("    " + describe_reuse(rows[-1]))
    return {"rows": rows, "process_bytes": memory, "bookkeeping_seconds": measure_bookkeeping(lab)}


def measure_round(
    server: TritonServer, data: Path, requests: int, worker: Worker, history: int, candidates: int
) -> dict[str, float]:
    """Send the same new users twice to each model: seconds (medians) of the first and of the second time."""
    seconds: dict[str, float] = {}
    for state in ("cold", "warm"):
        for model, keeper in KEPT_BY.items():
            before = Counters(server.metrics_address)
            seconds[f"{state}_{model}"] = run_analyzer(model, server.grpc_address, data, Load(requests)).p50
            after = Counters(server.metrics_address)
            hits, misses = (
                after.get(keeper, f"kvcast_user_kv_{name}_total") - before.get(keeper, f"kvcast_user_kv_{name}_total")
                for name in ("hits", "misses")
            )
            # The analyzer may send a request more than once; it may not leave one out.
            if (state == "cold" and misses < requests) or (state == "warm" and misses):
                raise PerfError(
                    f"{state} {model}: expected {requests} different users, got {hits} hits, {misses} misses"
                )
    bare = [worker.ask(history, candidates, seed=5)["fuse"] for _ in range(max(5, requests // 3))]
    return seconds | {"bare_fuse": statistics.median(bare[1:])}


def summarise_rounds(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
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


def describe_reuse(row: Row) -> str:
    """Return one line of progress."""
    return (
        f"N={row['candidates']}: ranker cold {1e3 * row['cold_ranker']:.1f} ms, warm {1e3 * row['warm_ranker']:.1f}; "
        f"ranker_resident cold {1e3 * row['cold_ranker_resident']:.1f}, warm {1e3 * row['warm_ranker_resident']:.1f}; "
        f"bare fusion {1e3 * row['bare_fuse']:.1f}"
    )


def measure_bookkeeping(lab: Lab) -> dict[str, float]:
    """Median seconds that the cache itself takes a user, in a full cache: key, look-up, eviction, room; no encoding."""
    layout, length = lab.manifest.user_kv, lab.config.workload.history
    budget = int(1e6 * lab.count_megabytes(8))
    shapes = [(1, *layout.keys_shape(length)[1:])] * layout.layers + [
        (1, *layout.values_shape(length)[1:])
    ] * layout.layers
    cache = UserKVCache(lab.manifest.kv_id, lambda _: shapes, budget)
    log = ClickLog(lab.config.schema, seed=3)
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
        """Send visits in order, `IN_FLIGHT` at a time."""
        started = time.perf_counter()
        self.rankings += pool.map(lambda visit: rank_visit(self.client, visit), visits)
        self.seconds += time.perf_counter() - started


def rank_visit(client: RankerClient, visit: Visit) -> Ranking:
    """Rank one visit's candidates, and ask how it was done."""
    return client.rank(visit.request.history, visit.request.candidates, report=True)


def run_trace(lab: Lab, budgets: Sequence[int], visits: int, say: Any) -> Row:
    """Replay the same visits on every way of serving, in turn; compare their scores, too."""
    workload = lab.config.workload
    traffic = Traffic(workload.history, workload.candidates, shortest=max(1, workload.history // 2))
    trace = list(islice(Trace(ClickLog(lab.config.schema, seed=11), traffic, seed=11), visits))
    todo = [("no cache", RANKER.name, 0)]
    todo += [
        (name, model, users)
        for users in budgets
        for name, model in (("ensemble", RANKER.name), ("resident", RANKER_RESIDENT.name))
    ]
    with contextlib.ExitStack() as stack:
        ways = []
        for name, model, users in todo:
            server = stack.enter_context(lab.serve([model], users))
            client = stack.enter_context(RankerClient(server.grpc_address, model=model, deadline=600, retry=NO_RETRIES))
            client.get_manifest()
            ways.append(Way(name, model, users, client, []))
        pool = stack.enter_context(ThreadPoolExecutor(IN_FLIGHT))
        for first in range(0, visits, VISITS_PER_TURN):
            for way in ways:
                way.replay(trace[first : first + VISITS_PER_TURN], pool)
            say(f"    {min(visits, first + VISITS_PER_TURN)} of {visits} visits on {len(ways)} servers")
    reference = ways[0].rankings
    for way in ways[1:]:
        for visit, (expected, got) in enumerate(zip(reference, way.rankings, strict=True)):
            difference = float(np.abs(expected.scores - got.scores).max())
            if not difference <= SCORE_TOLERANCE:
                raise PerfError(
                    f"{way.name}, {way.users} users: visit {visit} has scores that differ by {difference:.1e}"
                )
    rows = [summarise_way(lab, way, trace) for way in ways]
    for row in rows:
        say("    " + describe_way(row))
    return {"rows": rows, "visits": visits, "in_flight": IN_FLIGHT, "traffic": vars(traffic)}


def summarise_way(lab: Lab, way: Way, trace: Sequence[Visit]) -> Row:
    """Return hit rate (and what a perfect LRU of that budget would have), latency and throughput."""
    seconds = np.array([ranking.seconds for ranking in way.rankings])
    hits = sum(ranking.report is not None and ranking.report.cache == CacheResult.HIT for ranking in way.rankings)
    budget = 1e6 * lab.count_megabytes(way.users)
    return {
        "way": way.name,
        "model": way.model,
        "users": way.users,
        "budget_bytes": budget,
        "hit_rate": hits / len(trace),
        "expected_hit_rate": simulate_lru(trace, lab.manifest.user_kv.bytes_of, budget) / len(trace),
        "p50": float(np.percentile(seconds, 50)),
        "p99": float(np.percentile(seconds, 99)),
        "throughput": len(trace) / way.seconds,
    }


def simulate_lru(trace: Sequence[Visit], bytes_of: Any, budget: float) -> int:
    """Return the hits of a plain LRU by content, one request after the other."""
    kept: OrderedDict[bytes, int] = OrderedDict()
    hits = 0
    for visit in trace:
        key = visit.request.history.tobytes()
        if key in kept:
            hits += 1
            kept.move_to_end(key)
            continue
        size = bytes_of(len(visit.request.history))
        if size > budget:
            continue
        while sum(kept.values()) + size > budget:
            kept.popitem(last=False)
        kept[key] = size
    return hits


def describe_way(row: Row) -> str:
    """Return one line of progress."""
    return (
        f"{row['way']}, room for {row['users']} users: {100 * row['hit_rate']:.0f}% hits, "
        f"p50 {1e3 * row['p50']:.0f} ms, p99 {1e3 * row['p99']:.0f} ms, {row['throughput']:.1f}/s"
    )


# ---- memory over minutes --------------------------------------------------------------------------------------------


def run_endurance(lab: Lab, seconds: float, say: Any) -> Row:
    """Serve a trace of histories of all lengths for minutes, and watch the memory of the processes that keep users."""
    workload, limits = lab.config.workload, lab.config.limits
    traffic = Traffic(min(2 * workload.history, limits.history), workload.candidates, shortest=1)
    visits = iter(Trace(ClickLog(lab.config.schema, seed=13), traffic, seed=13))
    lock, samples, served = threading.Lock(), [], [0]
    models = list(KEPT_BY)
    with lab.serve(models, users=ENDURANCE_USERS) as server:
        base = read_model_memory(server)
        ends = time.monotonic() + seconds

        def keep_asking() -> None:
            with contextlib.ExitStack() as stack:
                clients = [
                    stack.enter_context(RankerClient(server.grpc_address, model=model, deadline=600, retry=NO_RETRIES))
                    for model in models
                ]
                while time.monotonic() < ends:
                    with lock:
                        visit = next(visits)
                        served[0] += 1
                        turn = served[0]
                    clients[turn % len(clients)].rank(visit.request.history, visit.request.candidates)

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            asking = [pool.submit(keep_asking) for _ in range(IN_FLIGHT)]
            started = time.monotonic()
            while time.monotonic() < ends:
                samples.append(sample_memory(server, time.monotonic() - started))
                time.sleep(max(0.5, seconds / 300))
            for each in asking:
                each.result()
        samples.append(sample_memory(server, time.monotonic() - started))
    budget = 1e6 * lab.count_megabytes(ENDURANCE_USERS)
    beyond = {
        keeper: max(sample["process_bytes"][keeper] for sample in samples) - base[keeper] - budget
        for keeper in KEPT_BY.values()
    }
    say(
        f"    {served[0]} requests; beyond start and budget: "
        + ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in beyond.items())
    )
    return {
        "seconds": seconds,
        "requests": served[0],
        "budget_bytes": budget,
        "start_bytes": base,
        "beyond_budget_bytes": beyond,
        "longest_history": traffic.history,
        "samples": samples,
    }


def sample_memory(server: TritonServer, seconds: float) -> Row:
    """Return what the keepers of users hold now: by the system's count, and by their own."""
    counters, memory = Counters(server.metrics_address), read_model_memory(server)
    keepers = list(KEPT_BY.values())
    return {
        "seconds": seconds,
        "process_bytes": {keeper: memory[keeper] for keeper in keepers},
        "cache_bytes": {keeper: counters.get(keeper, "kvcast_user_kv_bytes") for keeper in keepers},
    }
