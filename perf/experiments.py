"""The experiments: each measures one claim, alternating what it compares, and returns plain data for the result file.

They see kvcast as a caller does (a running server), but for the peers and for bare ONNX Runtime. They draw no
conclusions; `report` does.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from kvcast.synthetic import ClickLog
from perf.analyzer import Load, Measurement, PerfError, run_analyzer, write_input_data
from perf.baselines.race import Field, race, start_workers
from perf.baselines.softmax import choose_peers
from perf.cost_model import CostModel, claimed_gain, claimed_speedup, throughput_drop

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
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How thorough a run is. `traditional_limit`: seconds that one traditional request may take to be measured."""

    rounds: int
    requests: int
    traditional_limit: float
    quick: bool


class Bench:
    """A running server, its configuration, and a folder for perf_analyzer's input files."""

    def __init__(self, server: TritonServer, config: ModelConfig, plan: Plan, say: Callable[[str], None]) -> None:
        self.server, self.config, self.plan, self.say = server, config, plan, say
        self._log = ClickLog(config.schema, seed=2024)
        self._folder = tempfile.TemporaryDirectory()

    def close(self) -> None:
        """Remove the input files."""
        self._folder.cleanup()

    def measure(self, model: str, history: int, candidates: int, load: Load) -> Measurement:
        """Run perf_analyzer once on generated requests of this size."""
        path = Path(self._folder.name) / f"{history}_{candidates}.json"
        if not path.exists():
            write_input_data([self._log.draw_request(history, candidates) for _ in range(DIFFERENT_REQUESTS)], path)
        return run_analyzer(model, self.server.grpc_address, path, load)

    def compare(self, history: int, candidates: int, per_candidate: float | None) -> Row:
        """Time `ranker` and `ranker_full` in turn; extrapolate the latter where one request would take too long.

        Args:
            history: L.
            candidates: N.
            per_candidate: seconds a candidate in the traditional scheme, if known.
        """
        expected = (per_candidate or 0) * candidates
        is_measured = per_candidate is None or expected <= self.plan.traditional_limit
        rounds = self.plan.rounds if expected < 10 else 1
        requests = max(3, min(self.plan.requests, int(self.plan.requests * 50 / candidates)))
        shared, traditional = [], []
        for _ in range(rounds):
            shared.append(self.measure(RANKER.name, history, candidates, Load(requests)).p50)
            if is_measured:
                repeats = max(1, min(5, int(4 / expected))) if expected else 3
                load = Load(repeats if expected < 10 else 1)
                traditional.append(self.measure(RANKER_FULL.name, history, candidates, load).p50)
        row: Row = {
            "history": history,
            "candidates": candidates,
            "shared_seconds": statistics.median(shared),
            "shared_rounds": shared,
            "traditional_seconds": statistics.median(traditional) if traditional else expected,
            "traditional_rounds": traditional,
            "traditional_is_extrapolated": not is_measured,
        }
        if traditional:
            row["speedup"] = statistics.median(slow / fast for slow, fast in zip(traditional, shared, strict=True))
        else:
            row["speedup"] = expected / row["shared_seconds"]
        self.say(
            f"    L={history} N={candidates}: shared {1e3 * row['shared_seconds']:.1f} ms, traditional "
            f"{1e3 * row['traditional_seconds']:.0f} ms{' (extrapolated)' if not is_measured else ''}, "
            f"{row['speedup']:.1f}×"
        )
        return row


def keep_served(counts: Sequence[int], config: ModelConfig) -> list[int]:
    """Return the counts of candidates that are within the configuration's limit."""
    return [count for count in counts if count <= config.limits.candidates]


def run_table(bench: Bench, counts: Sequence[int]) -> list[Row]:
    """The documents' table: claim, ideal, measured."""
    history = bench.config.workload.history
    cost = CostModel.of(bench.config)
    rows: list[Row] = []
    per_candidate: float | None = None
    for count in counts:
        row = bench.compare(history, count, per_candidate)
        per_candidate = row["traditional_seconds"] / count
        ratio = 1 / row["speedup"]
        rows.append(
            row
            | {
                "claimed_speedup": claimed_speedup(count),
                "ideal_speedup": cost.ideal_speedup(count),
                "gain": 1 - ratio,
                "claimed_gain": claimed_gain(count),
                "throughput_drop": throughput_drop(ratio),
            }
        )
    return rows


def measure_fusion_ratio(bench: Bench) -> Row:
    """C_fusion ÷ C_user: the slope of the fusion run over N, by the encoder run, as the server reports them."""
    few, many = 10, min(110, bench.config.limits.candidates)
    log = ClickLog(bench.config.schema, seed=9)
    history = bench.config.workload.history
    fusion: dict[int, list[float]] = {few: [], many: []}
    encode = []
    with RankerClient(bench.server.grpc_address, deadline=600) as client:
        for _ in range(bench.plan.requests + 1):
            for count, seconds in fusion.items():
                request = log.draw_request(history, count)
                report = rank_reported(client, request)[1]
                seconds.append(report.fuse_seconds)
                encode.append(report.encode_seconds)
    candidate = (statistics.median(fusion[many][1:]) - statistics.median(fusion[few][1:])) / (many - few)
    user = statistics.median(encode[2:])
    return {"candidate_seconds": candidate, "user_seconds": user, "ratio": candidate / user, "between": [few, many]}


def run_history_growth(bench: Bench, lengths: Sequence[int]) -> list[Row]:
    """Both schemes as the history grows, at a typical N."""
    rows: list[Row] = []
    per_flop: float | None = None
    for length in lengths:
        model = CostModel.of(bench.config, length)
        flops = model.traditional_flops(1)
        row = bench.compare(length, GROWTH_CANDIDATES, per_flop * flops if per_flop else None)
        per_flop = row["traditional_seconds"] / GROWTH_CANDIDATES / flops
        rows.append(row | {"ideal_speedup": model.ideal_speedup(GROWTH_CANDIDATES)})
    return rows


def rank_reported(client: RankerClient, request: RankRequest) -> tuple[float, Report]:
    """Rank; return the seconds that it took and the server's own account of them."""
    ranking = client.rank(request.history, request.candidates, report=True)
    if ranking.report is None:
        raise PerfError("the server sent no report: is it of this version?")
    return ranking.seconds, ranking.report


def run_stages(bench: Bench, field: Field) -> Row:
    """Where the time of one cold request goes: the server's account, and bare ONNX Runtime beside it."""
    history, candidates = bench.config.workload.history, bench.config.workload.candidates
    config, server = bench.config, bench.server
    log = ClickLog(config.schema, seed=5)
    requests = [log.draw_request(history, candidates) for _ in range(bench.plan.requests)]
    # The bare runs are interleaved with the served ones: this machine's speed drifts.
    bare_encode, bare_fuse, total, reports = [], [], [], []
    with start_workers(["shared"], field) as (worker,), RankerClient(server.grpc_address, deadline=600) as client:
        for request in requests[:3]:
            client.rank(request.history, request.candidates)
            worker.ask(history, candidates, seed=6)
        for request in requests:
            seconds, report = rank_reported(client, request)
            total.append(seconds)
            reports.append(report)
            bare = worker.ask(history, candidates, seed=6)
            bare_encode.append(bare["encode"])
            bare_fuse.append(bare["fuse"])
    whole = statistics.median(total)
    encode, fuse = statistics.median(bare_encode), statistics.median(bare_fuse)
    ranked = {
        "encode: ONNX Runtime": encode,
        "encode: around it": max(0.0, statistics.median(report.encode_seconds for report in reports) - encode),
        "fuse: ONNX Runtime": fuse,
        "fuse: around it": max(0.0, statistics.median(report.fuse_seconds for report in reports) - fuse),
    }
    ranked["Triton, client, user KV from process to process"] = max(0.0, whole - sum(ranked.values()))
    share = (whole - encode - fuse) / whole
    bench.say(f"    {1e3 * whole:.1f} ms, of it outside ONNX Runtime {100 * share:.0f}%")
    return {
        "history": history,
        "candidates": candidates,
        "total_seconds": whole,
        "stages_seconds": ranked,
        "outside_onnxruntime_share": share,
        "requests": len(requests),
    }


def run_load(bench: Bench) -> Row:
    """Throughput and tails at rising concurrency, and under Poisson arrivals."""
    history, candidates = bench.config.workload.history, bench.config.workload.candidates
    closed, opened = [], []
    concurrencies, rates = (QUICK_CONCURRENCIES, QUICK_RATES) if bench.plan.quick else (CONCURRENCIES, RATES)
    for concurrency in concurrencies:
        requests = bench.plan.requests * concurrency
        got = bench.measure(RANKER.name, history, candidates, Load(requests, concurrency=concurrency))
        # perf_analyzer counts its own start-up into the window of a fixed number of requests; Little's law does not.
        closed.append(
            {"concurrency": concurrency, "throughput": concurrency / got.mean, "p50": got.p50, "p99": got.p99}
        )
        bench.say(f"    {concurrency} in flight: {closed[-1]['throughput']:.1f}/s, p99 {1e3 * got.p99:.0f} ms")
    capacity = closed[0]["throughput"]
    for share in rates:
        rate = round(share * capacity, 2)
        requests = max(2 * bench.plan.requests, int(rate * (5 if bench.plan.quick else 20)))
        got = bench.measure(RANKER.name, history, candidates, Load(requests, rate=rate))
        opened.append({"rate": rate, "share_of_capacity": share, "p50": got.p50, "p99": got.p99, "requests": requests})
        bench.say(f"    Poisson, {rate:.1f}/s: p50 {1e3 * got.p50:.0f} ms, p99 {1e3 * got.p99:.0f} ms")
    return {"history": history, "candidates": candidates, "closed_loop": closed, "open_loop": opened}


def run_peers(
    field: Field,
    config: ModelConfig,
    counts: Sequence[int],
    rounds: int,
    names: Sequence[str],
    say: Callable[[str], None],
) -> list[Row]:
    """What people would otherwise write, in the same run and dtype; peers that cannot run this network are left out."""
    rows, history = [], config.workload.history
    names = leave_out(config, names, say)
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


def _say_total(result: Row) -> str:
    return "failed" if "error" in result else f"{1e3 * result['total']:.1f} ms"


def run_memory(field: Field, config: ModelConfig, say: Callable[[str], None]) -> list[Row]:
    """Peak memory that one request adds: traditional, expanded KV, shared; each in a fresh process."""
    history, kv = config.workload.history, CostModel.of(config).user_kv_bytes()
    rows: list[Row] = []
    schemes = {"traditional": (50,), "ort_expanded": (50, 100), "shared": (50, 100, 1000)}
    for name in leave_out(config, list(schemes), say):
        for count in keep_served(schemes[name], config):
            with start_workers([name], field) as (worker,):
                worker.ask(history, 2, seed=1)  # the sessions' own first allocations
                answer = worker.ask(history, count, seed=1)
            rows.append(
                {
                    "scheme": name,
                    "candidates": count,
                    "added_bytes": answer.get("added_bytes"),
                    "error": answer.get("error"),
                    "copies_bytes": (count - 1) * kv,
                }
            )
            got = "failed" if answer.get("error") else f"{answer['added_bytes'] / 1e6:.0f} MB"
            say(f"    {name} N={count}: {got}; (N-1) × user KV = {rows[-1]['copies_bytes'] / 1e6:.0f} MB")
    return rows


def run_packing(config: ModelConfig, rounds: int, server: TritonServer, say: Callable[[str], None]) -> list[Row]:
    """Eight users in one Triton batch against one after the other, at small N, served."""
    history, users = config.workload.history, 8
    log = ClickLog(config.schema, seed=8)
    rows = []
    for length in sorted({min(length, history) for length in (32, 128, history)}):
        for count in (1, 10):
            requests = [log.draw_request(length, count) for _ in range(users)]
            with RankerClient(server.grpc_address, deadline=600) as client:
                alone, together = [], []
                for _ in range(rounds + 1):
                    started = time.perf_counter()
                    for request in requests:
                        client.rank(request.history, request.candidates)
                    alone.append(time.perf_counter() - started)
                    together.append(rank_together(server, requests))
            row = {
                "history": length,
                "candidates": count,
                "users": users,
                "one_by_one_seconds": statistics.median(alone[1:]),
                "one_batch_seconds": statistics.median(together[1:]),
            }
            row["speedup"] = row["one_by_one_seconds"] / row["one_batch_seconds"]
            rows.append(row)
            say(
                f"    L={length} N={count}: 8 users one by one {1e3 * row['one_by_one_seconds']:.1f} ms, in one batch "
                f"{1e3 * row['one_batch_seconds']:.1f} ms"
            )
    return rows


def rank_together(server: TritonServer, requests: Sequence[Any]) -> float:
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
