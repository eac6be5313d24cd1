"""What a result file says of the seconds that a ranking takes, and what follows from it for sizes not measured.

It reads what `kvcast perf run` wrote. Sizes between those measured are interpolated, others scaled by FLOPs; every
number says which.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kvcast.contract.config import list_configs, load_config
from kvcast.contract.tensors import RANKER, RANKER_RESIDENT
from kvcast.perf.analyzer import PerfError
from kvcast.perf.cost_model import CostModel

Row = dict[str, Any]


class Point(NamedTuple):
    """A measured time."""

    history: int
    candidates: int
    seconds: float


class Estimate(NamedTuple):
    """Seconds, and how they are known."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Measurements:
    """The times of one model on one kind of machine. `model` is who answers; the traditional scheme is always there."""

    config: Row
    machine: Row
    model: str
    cold: list[Point]
    warm: list[Point]
    traditional: list[Point]
    peak: Row | None  # requests a second that were reached, at a size
    start_bytes: int | None  # of the model's process, before its first request
    run_bytes: list[Row]  # what a request adds at its peak

    def cost(self, history: int) -> CostModel:
        """Return the cost model at this L."""
        config = self.config
        sizes = (config["width"], config["layers"], config["heads"], config["candidate_tokens"])
        return CostModel(history, *sizes, config.get("layer_flops"))

    def estimate_cold(self, history: int, candidates: int) -> Estimate:
        """Return the seconds of a server that a new user takes; from the peak throughput if that was measured."""
        peak = self.peak
        if peak and (peak["history"], peak["candidates"]) == (history, candidates):
            return Estimate(1 / peak["rate"], f"measured, at the peak of {peak['rate']:.1f}/s")
        return estimate(self.cold, history, candidates, lambda length, count: self.cost(length).shared_flops(count))

    def estimate_warm(self, history: int, candidates: int) -> Estimate:
        """Return the seconds that a user who is kept takes."""
        return estimate(self.warm, history, candidates, lambda length, count: count * self.cost(length).fusion_flops())

    def estimate_traditional(self, history: int, candidates: int) -> Estimate:
        """Return the seconds of a request in the traditional scheme."""
        if not self.traditional:
            seconds = estimate(
                self.cold, history, candidates, lambda length, count: self.cost(length).shared_flops(count)
            ).seconds
            ideal = self.cost(history).ideal_speedup(candidates)
            return Estimate(ideal * seconds, f"not in the file: {ideal:.1f} × encoded, the ratio of their FLOPs")
        return estimate(
            self.traditional, history, candidates, lambda length, count: self.cost(length).traditional_flops(count)
        )

    def find_run_bytes(self, history: int, candidates: int) -> int | None:
        """Return what a request of at least this N adds at its peak, if that was measured at this L."""
        if history != self.config["history"]:
            return None
        fitting = [row for row in self.run_bytes if row["candidates"] >= candidates]
        return min(fitting, key=lambda row: int(row["candidates"]))["added_bytes"] if fitting else None


def estimate(points: Sequence[Point], history: int, candidates: int, flops: Callable[[int, int], float]) -> Estimate:
    """Return what was measured at this size, else what lies between two measured N, times the ratio of the FLOPs.

    The time grows with N as FLOPs do, along a line that does not begin at 0; hence lines first, and FLOPs for the rest.
    """
    wanted = flops(history, candidates)
    ways = []
    for length in dict.fromkeys(point.history for point in points):
        same = sorted((point.candidates, point.seconds) for point in points if point.history == length)
        reached = min(max(candidates, same[0][0]), same[-1][0])
        seconds, source = interpolate(same, reached)
        ratio = wanted / flops(length, reached)
        ways.append((max(ratio, 1 / ratio), Estimate(seconds * ratio, source), (length, reached)))
    _, (seconds, source), (length, reached) = min(ways)
    if (length, reached) == (history, candidates):
        return Estimate(seconds, source)
    between = "" if source == "measured" else f", itself {source}"
    return Estimate(seconds, f"scaled by FLOPs from N={reached}, L={length}{between}")


def interpolate(same: Sequence[tuple[int, float]], candidates: int) -> tuple[float, str]:
    """Return the seconds at an N within those measured, sorted by N."""
    above = next(place for place, (count, _) in enumerate(same) if count >= candidates)
    many, slow = same[above]
    if many == candidates:
        return slow, "measured"
    few, fast = same[above - 1]
    return fast + (slow - fast) * (candidates - few) / (many - few), f"between N={few} and N={many}, measured"


def read_measurements(paths: Sequence[Path]) -> Measurements:
    """Read result files of one configuration; what one lacks another may have.

    Raises:
        PerfError: a file cannot be used, or none has what is needed.
    """
    results = [read_result(path) for path in paths]
    first = results[0]
    for path, result in zip(paths, results, strict=True):
        if result["config"] != first["config"]:
            raise PerfError(f"{path}: expected a result of {first['config']['name']}, got {result['config']['name']}")
    merged: Row = {}
    for result in reversed(results):  # the first has the last word
        merged |= result
    return assemble(merged, ", ".join(map(str, paths)))


def read_result(path: Path) -> Row:
    """Read one result file.

    Raises:
        PerfError: it is not one.
    """
    try:
        result: Row = json.loads(path.read_text())
    except OSError as error:
        raise PerfError(f"{path}: cannot be read ({error.strerror}): `kvcast perf run` writes result files") from error
    except ValueError as error:
        raise PerfError(f"{path}: not JSON ({error}): expected a result file of `kvcast perf run`") from error
    if not isinstance(result, dict) or not {"config", "machine"} <= set(result):
        raise PerfError(f"{path}: expected a result file of `kvcast perf run`, with `config` and `machine`")
    return result


def assemble(result: Row, where: str) -> Measurements:
    """Return the measurements that a result holds; `ranker_resident`'s if they are there, else `ranker`'s.

    Raises:
        PerfError: neither's are.
    """
    # The table has the last word where both measured the same size.
    both = result.get("history_growth", []) + result.get("table", [])
    growth = list({(row["history"], row["candidates"]): row for row in both}.values())
    common = Measurements(
        config=result["config"],
        machine=result["machine"],
        model=RANKER_RESIDENT.name,
        cold=[],
        warm=[],
        traditional=[
            Point(row["history"], row["candidates"], row["traditional_seconds"])
            for row in growth
            if not row["traditional_is_extrapolated"]
        ],
        peak=None,
        start_bytes=None,
        run_bytes=[row for row in result.get("memory", []) if row["scheme"] == "shared" and row["added_bytes"]],
    )
    if "reuse" in result:
        rows = result["reuse"]["rows"]
        return replace(
            common,
            cold=[Point(row["history"], row["candidates"], row["cold_ranker_resident"]) for row in rows],
            warm=[Point(row["history"], row["candidates"], row["warm_ranker_resident"]) for row in rows],
            start_bytes=result["reuse"]["process_bytes"].get(RANKER_RESIDENT.name),
        )
    if "table" in result and "fusion" in result:
        encode = result["fusion"]["user_seconds"]
        return replace(
            common,
            model=RANKER.name,
            cold=[Point(row["history"], row["candidates"], row["shared_seconds"]) for row in growth],
            # What is left of a cold request when encoding, as the server reports it, falls away.
            warm=[
                Point(row["history"], row["candidates"], max(0.0, row["shared_seconds"] - encode))
                for row in result["table"]
            ],
            peak=find_peak(result.get("load")),
        )
    has = sorted(set(result) - {"name", "quick", "command", "finished", "machine", "config", "seconds"})
    config = result["config"]["name"]
    raise PerfError(
        f"{where}: expected `reuse` (kvcast perf run --config {config} --experiments reuse), or `table` (--experiments "
        f"table), got {', '.join(has) or 'nothing'}"
    )


def find_peak(load: Row | None) -> Row | None:
    """Return the highest throughput that was reached with requests always waiting."""
    if not load:
        return None
    rate = max(row["throughput"] for row in load["closed_loop"])
    return {"history": load["history"], "candidates": load["candidates"], "rate": rate}


def choose_size(config: Row, history: int | None, candidates: int | None) -> tuple[int, int]:
    """Return the L and N that are meant: the configuration's own where none is given.

    Raises:
        PerfError: requests of this size are not served.
    """
    # A configuration that does not come with the project has limits and a workload that the result file does not hold.
    known = load_config(config["name"]) if config["name"] in list_configs() else None
    length = config["history"] if history is None else history
    count = known.workload.candidates if candidates is None and known else candidates
    if count is None:
        raise PerfError(f"candidates: expected a number, as {config['name']} does not come with the project")
    for name, value, limit in (
        ("candidates", count, known and known.limits.candidates),
        ("history", length, known and known.limits.history),
    ):
        if value < 1 or (limit and value > limit):
            expected = f"1 to {limit}, the limit of {config['name']}" if limit else "at least 1"
            raise PerfError(f"{name}: expected {expected}, got {value}")
    return length, count
