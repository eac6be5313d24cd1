"""The experiments on cold requests: each measures one claim, alternating what it compares, and returns its record.

They use a running server, as callers do, except for the peers and for bare ONNX Runtime.
"""

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc

from kvcast.client import RankerClient
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.report import Report
from kvcast.protocol.request import RankRequest
from kvcast.protocol.tensors import RANKER, RANKER_FULL
from kvcast.server import TritonServer
from kvcast.serving.options import CACHE_BUDGET
from kvcast.synthetic import ClickLog, write_perf_input
from perf.analyzer import Load, Measurement, PerfError, run_analyzer
from perf.baselines.race import Field, race, start_workers
from perf.baselines.softmax import choose_peers
from perf.cost_model import CostModel, claimed_gain, claimed_speedup, throughput_drop
from perf.harness import Harness, Record

TABLE_COUNTS = (1, 5, 10, 50, 100, 1000)
HISTORY_LENGTHS = (250, 500, 1000, 2000, 4000)
GROWTH_CANDIDATES = 50
PEERS = ("shared", "ort_expanded", "torch_expanded", "torch_flash", "torch_flash_compiled")
PEER_COUNTS = (10, 100, 1000)
QUICK_PEER_COUNTS = (10, 100)
CONCURRENCIES = (1, 2, 4, 8)
RATES = (0.25, 0.5, 0.75, 0.9)  # of the throughput at one request in flight
QUICK_CONCURRENCIES, QUICK_RATES = (1, 4), (0.5, 0.75)
DIFFERENT_REQUESTS = 8


@dataclass(frozen=True)
class Comparison:
    """`ranker` and `ranker_full` (full recomputation) at one size; the latter extrapolated where it takes too long."""

    history: int
    candidates: int
    shared_seconds: float
    shared_rounds: list[float]
    traditional_seconds: float
    traditional_rounds: list[float]
    traditional_is_extrapolated: bool
    speedup: float
    ideal_speedup: float


@dataclass(frozen=True)
class Bench:
    """A running server without a cache, and a folder for perf_analyzer's input files."""

    harness: Harness
    server: TritonServer
    folder: Path
    log: ClickLog

    def measure(self, model: str, history: int, candidates: int, load: Load) -> Measurement:
        """Run perf_analyzer once on generated requests of this size."""
        path = self.folder / f"{history}_{candidates}.json"
        if not path.exists():
            write_perf_input([self.log.draw_request(history, candidates) for _ in range(DIFFERENT_REQUESTS)], path)
        return run_analyzer(model, self.server.grpc_address, path, load)

    def compare(self, history: int, candidates: int, per_candidate: float | None) -> Comparison:
        """Time `ranker` and `ranker_full` in turn; extrapolate the latter where one request would take too long.

        Args:
            history: L.
            candidates: N.
            per_candidate: seconds a candidate of full recomputation, if known.
        """
        plan, expected = self.harness.plan, (per_candidate or 0) * candidates
        is_measured = per_candidate is None or expected <= plan.traditional_limit
        requests = max(3, min(plan.requests, int(plan.requests * 50 / candidates)))
        repeats = max(1, min(5, int(4 / expected))) if expected else 3
        shared, full = [], []
        for _ in range(plan.rounds if expected < 10 else 1):
            shared.append(self.measure(RANKER.name, history, candidates, Load(requests)).p50)
            if is_measured:
                full.append(self.measure(RANKER_FULL.name, history, candidates, Load(repeats)).p50)
        fast = statistics.median(shared)
        slow = statistics.median(full) if full else expected
        ratios = [each / other for each, other in zip(full, shared, strict=False)]
        speedup = statistics.median(ratios) if ratios else slow / fast
        self.harness.say(
            f"    L={history} N={candidates}: shared {1e3 * fast:.1f} ms, full recomputation {1e3 * slow:.0f} ms"
            f"{'' if is_measured else ' (extrapolated)'}, {speedup:.1f}×"
        )
        return Comparison(
            history=history,
            candidates=candidates,
            shared_seconds=fast,
            shared_rounds=shared,
            traditional_seconds=slow,
            traditional_rounds=full,
            traditional_is_extrapolated=not is_measured,
            speedup=speedup,
            ideal_speedup=CostModel.of(self.harness.config, history).ideal_speedup(candidates),
        )


@contextlib.contextmanager
def open_bench(harness: Harness) -> Iterator[Bench]:
    """Serve without a cache, on the ports that the run was given."""
    settings = replace(harness.settings, parameters={CACHE_BUDGET: "0"})
    with TritonServer(settings) as server, tempfile.TemporaryDirectory() as folder:
        yield Bench(harness, server, Path(folder), ClickLog(harness.config.schema, seed=2024))


def run_table(bench: Bench) -> list[Record]:
    """The documents' table: claim, ideal, measured."""
    rows: list[Record] = []
    per_candidate: float | None = None
    for count in bench.harness.keep_served(bench.harness.plan.counts or TABLE_COUNTS):
        row = bench.compare(bench.harness.config.workload.history, count, per_candidate)
        per_candidate = row.traditional_seconds / count
        rows.append(
            vars(row)
            | {
                "claimed_speedup": claimed_speedup(count),
                "gain": 1 - 1 / row.speedup,
                "claimed_gain": claimed_gain(count),
                "throughput_drop": throughput_drop(1 / row.speedup),
            }
        )
    return rows


def measure_fusion_ratio(bench: Bench) -> Record:
    """C_fusion ÷ C_user: the slope of the fusion run over N, by the encoder run, as the server reports them."""
    config = bench.harness.config
    few, many = 10, min(110, config.limits.candidates)
    log = ClickLog(config.schema, seed=9)
    fusion: dict[int, list[float]] = {few: [], many: []}
    encode = []
    with RankerClient(bench.server.grpc_address, deadline=600) as client:
        for _ in range(bench.harness.plan.requests + 1):
            for count, seconds in fusion.items():
                report = rank_reported(client, log.draw_request(config.workload.history, count))[1]
                seconds.append(report.fuse_seconds)
                encode.append(report.encode_seconds)
    candidate = (statistics.median(fusion[many][1:]) - statistics.median(fusion[few][1:])) / (many - few)
    user = statistics.median(encode[2:])
    return {"candidate_seconds": candidate, "user_seconds": user, "ratio": candidate / user, "between": [few, many]}


def run_history_growth(bench: Bench) -> list[Comparison]:
    """Both schemes as the history grows, at a typical N."""
    config, rows = bench.harness.config, []
    lengths = [length for length in HISTORY_LENGTHS if length <= config.limits.history]
    per_flop: float | None = None
    for length in bench.harness.choose(lengths, lengths[::2]):
        flops = CostModel.of(config, length).full_flops(1)
        rows.append(bench.compare(length, GROWTH_CANDIDATES, per_flop * flops if per_flop else None))
        per_flop = rows[-1].traditional_seconds / GROWTH_CANDIDATES / flops
    return rows


def rank_reported(client: RankerClient, request: RankRequest) -> tuple[float, Report]:
    """Rank; return the seconds that it took and the server's report of them."""
    ranking = client.rank(request.history, request.candidates, report=True)
    if ranking.report is None:
        raise PerfError("the server sent no report: is it of this version?")
    return ranking.seconds, ranking.report


def run_stages(bench: Bench) -> Record:
    """Where the time of one cold request goes: by the server's report, and by bare ONNX Runtime beside it."""
    config = bench.harness.config
    history, candidates = config.workload.history, config.workload.candidates
    log = ClickLog(config.schema, seed=5)
    requests = [log.draw_request(history, candidates) for _ in range(bench.harness.plan.requests)]
    # The bare runs are interleaved with the served ones: this machine's speed drifts.
    bare, served = [], []
    address, field = bench.server.grpc_address, bench.harness.field
    with start_workers(["shared"], field) as (worker,), RankerClient(address, deadline=600) as client:
        for request in requests[:3]:
            client.rank(request.history, request.candidates)
            worker.ask(history, candidates, seed=6)
        for request in requests:
            served.append(rank_reported(client, request))
            bare.append(worker.ask(history, candidates, seed=6))
    whole = statistics.median(seconds for seconds, _ in served)
    encode, fuse = (statistics.median(each[stage] for each in bare) for stage in ("encode", "fuse"))
    stages = {
        "encode: ONNX Runtime": encode,
        "encode: around it": max(0.0, statistics.median(report.encode_seconds for _, report in served) - encode),
        "fuse: ONNX Runtime": fuse,
        "fuse: around it": max(0.0, statistics.median(report.fuse_seconds for _, report in served) - fuse),
    }
    stages["Triton, client, user KV from process to process"] = max(0.0, whole - sum(stages.values()))
    share = (whole - encode - fuse) / whole
    bench.harness.say(f"    {1e3 * whole:.1f} ms, of it outside ONNX Runtime {100 * share:.0f}%")
    return {
        "history": history,
        "candidates": candidates,
        "total_seconds": whole,
        "stages_seconds": stages,
        "outside_onnxruntime_share": share,
        "requests": len(requests),
    }


def run_load(bench: Bench) -> Record:
    """Throughput and tails at rising concurrency, and under Poisson arrivals."""
    harness, closed, opened, capacity = bench.harness, [], [], 0.0
    history, candidates = harness.config.workload.history, harness.config.workload.candidates
    for concurrency in harness.choose(CONCURRENCIES, QUICK_CONCURRENCIES):
        load = Load(harness.plan.requests * concurrency, concurrency=concurrency)
        got = bench.measure(RANKER.name, history, candidates, load)
        # perf_analyzer counts its own start-up into the window of a fixed number of requests; Little's law does not.
        throughput = concurrency / got.mean
        capacity = capacity or throughput
        closed.append({"concurrency": concurrency, "throughput": throughput, "p50": got.p50, "p99": got.p99})
        harness.say(f"    {concurrency} in flight: {throughput:.1f}/s, p99 {1e3 * got.p99:.0f} ms")
    for share in harness.choose(RATES, QUICK_RATES):
        rate = round(share * capacity, 2)
        requests = max(2 * harness.plan.requests, int(rate * harness.choose(20, 5)))
        got = bench.measure(RANKER.name, history, candidates, Load(requests, rate=rate))
        opened.append({"rate": rate, "share_of_capacity": share, "p50": got.p50, "p99": got.p99, "requests": requests})
        harness.say(f"    Poisson, {rate:.1f}/s: p50 {1e3 * got.p50:.0f} ms, p99 {1e3 * got.p99:.0f} ms")
    return {"history": history, "candidates": candidates, "closed_loop": closed, "open_loop": opened}


def race_peers(bench: Bench) -> list[Record]:
    """Race the peers; a quick run leaves out the one that takes longest to make, and the longest race."""
    harness = bench.harness
    counts = harness.keep_served(harness.choose(PEER_COUNTS, QUICK_PEER_COUNTS))
    names = harness.choose(PEERS, PEERS[:-1])
    return run_peers(harness.field, harness.config, counts, harness.plan.rounds, names, harness.say)


def run_peers(
    field: Field,
    config: ModelConfig,
    counts: Sequence[int],
    rounds: int,
    names: Sequence[str],
    say: Callable[[str], None],
) -> list[Record]:
    """Baselines, in the same run and dtype; peers that cannot run this network are left out."""
    rows: list[Record] = []
    history, names = config.workload.history, leave_out(config, names, say)
    say(f"    starting {', '.join(names)} (compiling takes a minute)")
    with start_workers(names, field) as workers:
        for count in counts:
            results = race(workers, history, count, rounds)
            rows.append({"history": history, "candidates": count, "peers": results})
            say(f"    N={count}: " + ", ".join(f"{name} {_say_total(result)}" for name, result in results.items()))
    return rows


def leave_out(config: ModelConfig, names: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Return the peers that run this network, and say which do not."""
    chosen, others = choose_peers(config, names)
    if others:
        say(f"    not for {config.network.family}, left out: {', '.join(others)}")
    return chosen


def _say_total(result: dict[str, Any]) -> str:
    return "failed" if "error" in result else f"{1e3 * result['total']:.1f} ms"


def run_memory(bench: Bench) -> list[Record]:
    """Peak memory that one request adds: full recomputation, expanded KV, shared; each in a fresh process."""
    harness = bench.harness
    rows: list[Record] = []
    history, kv = harness.config.workload.history, CostModel.of(harness.config).user_kv_bytes()
    schemes = {"traditional": (50,), "ort_expanded": (50, 100), "shared": (50, 100, 1000)}
    for name in leave_out(harness.config, list(schemes), harness.say):
        for count in harness.keep_served(schemes[name]):
            with start_workers([name], harness.field) as (worker,):
                worker.ask(history, 2, seed=1)  # the sessions' own first allocations
                answer = worker.ask(history, count, seed=1)
            added, copies = answer.get("added_bytes"), (count - 1) * kv
            row: Record = {"scheme": name, "candidates": count, "added_bytes": added, "error": answer.get("error")}
            rows.append(row | {"copies_bytes": copies})
            got = "failed" if added is None else f"{added / 1e6:.0f} MB"
            harness.say(f"    {name} N={count}: {got}; (N-1) × user KV = {copies / 1e6:.0f} MB")
    return rows


def run_packing(bench: Bench) -> list[Record]:
    """Eight users in one Triton batch against one after the other, at small N, served."""
    config, users = bench.harness.config, 8
    log = ClickLog(config.schema, seed=8)
    rows: list[Record] = []
    lengths = sorted({min(length, config.workload.history) for length in (32, 128, config.workload.history)})
    for length, count in itertools.product(lengths, (1, 10)):
        requests = [log.draw_request(length, count) for _ in range(users)]
        alone, together = [], []
        with RankerClient(bench.server.grpc_address, deadline=600) as client:
            for _ in range(bench.harness.plan.rounds + 1):
                started = time.perf_counter()
                for request in requests:
                    client.rank(request.history, request.candidates)
                alone.append(time.perf_counter() - started)
                together.append(rank_together(bench.server, requests))
        single, batch = statistics.median(alone[1:]), statistics.median(together[1:])
        rows.append(
            {
                "history": length,
                "candidates": count,
                "users": users,
                "one_by_one_seconds": single,
                "one_batch_seconds": batch,
                "speedup": single / batch,
            }
        )
        bench.harness.say(
            f"    L={length} N={count}: 8 users one by one {1e3 * single:.1f} ms, in one batch {1e3 * batch:.1f} ms"
        )
    return rows


def rank_together(server: TritonServer, requests: Sequence[RankRequest]) -> float:
    """Send the users of several requests of one size as one batch; return the seconds."""
    history = np.stack([request.history for request in requests])
    candidates = np.stack([request.candidates for request in requests])
    with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
        client.is_server_live()  # connect first
        inputs = []
        for name, array in (("history", history), ("candidates", candidates)):
            inputs.append(tritonclient.grpc.InferInput(name, list(array.shape), "INT64"))
            inputs[-1].set_data_from_numpy(array)
        started = time.perf_counter()
        client.infer(RANKER.name, inputs)
        return time.perf_counter() - started


COLD: Mapping[str, Callable[[Bench], Any]] = {
    "table": run_table,
    "history_growth": run_history_growth,
    "stages": run_stages,
    "load": run_load,
    "packing": run_packing,
    "memory": run_memory,
    "peers": race_peers,
}
