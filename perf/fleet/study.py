"""`kvcast perf simulate`: a fleet under generated or given traffic; `--study` writes the committed report.

It chooses scenarios and runs the simulator on them; what the numbers mean is for `report` to say.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvcast.perf.analyzer import PerfError
from kvcast.perf.environment import describe_machine
from kvcast.perf.fleet.capacity import Reuse, Visitors, expect
from kvcast.perf.fleet.measured import choose_size, read_measurements
from kvcast.perf.fleet.plan import add_visitor_options, read_visitors, say_time
from kvcast.perf.fleet.ring import Ring
from kvcast.perf.fleet.simulator import (
    FACTOR,
    POINTS,
    Change,
    Fleet,
    Policy,
    Simulation,
    count_moved,
    follow_hits,
    simulate,
    summarise,
)
from kvcast.perf.fleet.visits import Visits, draw_visits, read_visits

Row = dict[str, Any]
Say = Callable[[str], None]
RESULTS = Path("perf/results")
SERVERS, RATE_EACH, BUDGET, SECONDS = 20, 20.0, 1000, 2000.0
# What is counted begins when caches are full.
SETTLED_AFTER = 0.5
BUDGETS = (50, 100, 200, 500, 1000, 2000, 5000)
SIZES = (1, 2, 5, 10, 20, 40)
FACTORS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
ALL_POINTS = (16, 160, 1024, 4096)
# Requests a second for each server, of which the second keeps it busy for about four fifths of the time.
FACTOR_RATES = (20.0, 26.0)
# Rings over which the luck of the points is averaged.
RINGS = 20
LOSSES = ((1, Policy.BOUNDED), (5, Policy.BOUNDED), (5, Policy.AFFINITY))
# Parts of the trace after which servers are lost, and come back.
LOST_AFTER, BACK_AFTER = 0.5, 0.75
STEP_SECONDS = 20.0
# Hit rates that are this near are the same again.
RECOVERED_WITHIN = 0.01


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "simulate",
        help="many servers behind a proxy: hit rate, imbalance, the loss of servers",
        description="Simulate servers behind a proxy, each with a cache of its own, under generated or given traffic.",
    )
    parser.add_argument("--from", dest="results_from", type=Path, nargs="+", default=[RESULTS / "bench-kept.json"],
                        metavar="RESULT.json", help="result files: seconds of a ranking (bench-kept)")  # fmt: skip
    parser.add_argument("--candidates", type=int, metavar="N", help="of a request (the configuration's)")
    parser.add_argument("--history", type=int, metavar="L", help="events of a user (the configuration's)")
    parser.add_argument("--trace", type=Path, metavar="FILE.csv",
                        help="replay this: columns seconds, user, [content], [size]")  # fmt: skip
    parser.add_argument("--users", type=int, default=2_000_000, help="who may come (%(default)s)")
    parser.add_argument("--qps", type=float, metavar="RATE", help="requests a second (20 a server)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of traffic (%(default)g)")
    add_visitor_options(parser)
    parser.add_argument("--servers", type=int, default=SERVERS, help="(%(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="USERS",
                        help="of each server's cache, in users or in a trace's unit of size (%(default)s)")  # fmt: skip
    parser.add_argument("--time-to-live", type=float, default=0.0, metavar="S", help="as user_kv_cache_seconds (none)")
    parser.add_argument("--factor", type=float, default=FACTOR, help="bounded: hash-balance-factor ÷ 100 (%(default)g)")
    parser.add_argument("--points", type=int, default=POINTS, help="of a server on the ring: 16 × weight (%(default)s)")
    parser.add_argument("--lose", type=float, metavar="S", help="server 0 is lost for good after so many seconds")
    parser.add_argument("--settled", type=float, metavar="S",
                        help="count what comes after so many seconds (half of them; 0 for a trace)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--study", action="store_true", help="vary one thing after the other; write report and plots")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the study goes")


def run_simulate(arguments: argparse.Namespace) -> Row | None:
    """Simulate; return the result of a study, whose files are to be written."""
    measured = read_measurements(arguments.results_from)
    history, candidates = choose_size(measured.config, arguments.history, arguments.candidates)
    warm, cold = measured.estimate_warm(history, candidates), measured.estimate_cold(history, candidates)
    fleet = Fleet(
        servers=arguments.servers, budget=arguments.budget, factor=arguments.factor, points=arguments.points,
        warm_seconds=warm.seconds, cold_seconds=cold.seconds, time_to_live=arguments.time_to_live,
        changes=() if arguments.lose is None else (Change(arguments.lose, 0, is_up=False),),
    )  # fmt: skip
    if not arguments.study:
        rows = compare_policies(arguments, fleet)
        print(json.dumps(rows, indent=1) if arguments.json else describe_rows(rows))
        return None
    study = Study(read_visitors(arguments), fleet, arguments.seconds, arguments.seed)
    begun = time.monotonic()
    result: Row = {
        "name": "fleet",
        "kind": "fleet",
        "command": describe_command(arguments),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"python": platform.python_version(), "processor": describe_machine(1)["processor"]},
        "measured": {
            "results": list(map(str, arguments.results_from)), "config": measured.config["name"],
            "model": measured.model, "history": history, "candidates": candidates,
            "warm_seconds": warm.seconds, "cold_seconds": cold.seconds,
        },
        "visitors": vars(study.visitors),
        "scenario": {
            "servers": SERVERS, "rate_each": RATE_EACH, "budget": BUDGET, "seconds": arguments.seconds,
            "settled_after": study.settled_after, "points": arguments.points, "factor": arguments.factor,
        },
    }  # fmt: skip
    result |= study.run(lambda line: print(line, flush=True))
    result["seconds"] = time.monotonic() - begun
    return result


def describe_command(arguments: argparse.Namespace) -> str:
    """Return the command that makes the same study again."""
    parts = ["kvcast perf simulate --study"]
    known = Visitors(2_000_000)
    for option, value, default in (
        ("seconds", arguments.seconds, SECONDS), ("users", arguments.users, known.users),
        ("zipf", arguments.zipf, known.exponent), ("returns", arguments.returns, known.returns),
        ("page-seconds", arguments.page_seconds, known.page_seconds),
        ("unchanged", arguments.unchanged, known.unchanged), ("seed", arguments.seed, 0),
        ("factor", arguments.factor, FACTOR), ("points", arguments.points, POINTS),
    ):  # fmt: skip
        if value != default:
            parts.append(f"--{option} {value:g}")
    return " ".join(parts)


# ---- one simulation -------------------------------------------------------------------------------------------------


def compare_policies(arguments: argparse.Namespace, fleet: Fleet) -> list[Row]:
    """Send the same visits to the fleet under each policy."""
    if arguments.trace:
        visits, settled = read_visits(arguments.trace), arguments.settled or 0.0
    else:
        rate = RATE_EACH * fleet.servers if arguments.qps is None else arguments.qps
        expect(arguments.seconds > 0, "seconds", "more than 0", arguments.seconds)
        visits = draw_visits(read_visitors(arguments), rate, arguments.seconds, arguments.seed)
        settled = SETTLED_AFTER * arguments.seconds if arguments.settled is None else arguments.settled
    rows = []
    for policy in Policy:
        begun = time.monotonic()
        simulation = simulate(dataclasses.replace(fleet, policy=policy), visits)
        rows.append({"policy": policy} | summarise(simulation, settled) | {"took_seconds": time.monotonic() - begun})
        if len(simulation.rings) > 1:
            rows[-1]["moved"] = count_moved(simulation.rings[0], simulation.rings[1], np.unique(visits.users))
    return rows


def describe_rows(rows: Sequence[Row]) -> str:
    """Return a table for people."""
    header = ["policy", "visits", "hits", "busiest ÷ mean", "elsewhere", "busy", "mean", "p99", "simulated in"]
    cells = [
        [
            row["policy"],
            f"{row['visits']:,}",
            f"{100 * row['hit_rate']:.1f}%",
            f"{row['imbalance']:.2f}",
            f"{100 * row['elsewhere']:.1f}%",
            f"{100 * row['utilisation']:.0f}%",
            say_time(row["mean_seconds"]),
            say_time(row["p99_seconds"]),
            say_time(row["took_seconds"]),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *cells]
    ]
    if "moved" in rows[0]:
        lines.append(f"users with another server since one was lost: {100 * rows[0]['moved']:.1f}%")
    return "\n".join(lines)


# ---- the study ------------------------------------------------------------------------------------------------------


class Study:
    """One scenario, of which one thing is varied after the other."""

    def __init__(self, visitors: Visitors, fleet: Fleet, seconds: float, seed: int) -> None:
        self.visitors, self.seconds, self.seed = visitors, seconds, seed
        self.fleet = dataclasses.replace(fleet, servers=SERVERS, budget=BUDGET, changes=())
        self.settled_after = SETTLED_AFTER * seconds
        self._visits: dict[float, Visits] = {}

    def run(self, say: Say) -> Row:
        """Return all parts."""
        parts: dict[str, Callable[[], Any]] = {
            "policies": lambda: [self.measure(policy=policy) for policy in Policy],
            "budget": lambda: [
                self.measure(policy=policy, budget=budget)
                for budget in BUDGETS
                for policy in (Policy.AFFINITY, Policy.ROUND_ROBIN)
            ],
            "servers": lambda: [
                self.measure(policy=policy, servers=servers)
                for servers in SIZES
                for policy in (Policy.AFFINITY, Policy.ROUND_ROBIN)
            ],
            "factor": lambda: (
                [
                    self.measure(rate, policy=Policy.BOUNDED, factor=factor)
                    for rate in FACTOR_RATES
                    for factor in FACTORS
                ]
                + [self.measure(rate) for rate in FACTOR_RATES]
            ),
            "points": lambda: [self.weigh_rings(points) for points in ALL_POINTS],
            "loss": lambda: [self.lose(servers, policy) for servers, policy in LOSSES],
        }
        result = {}
        for name, measure in parts.items():
            begun = time.monotonic()
            result[name] = measure()
            say(f"{name}: {time.monotonic() - begun:.0f} s")
        return result

    def measure(self, rate_each: float = RATE_EACH, **settings: Any) -> Row:
        """Simulate one variation; the formula's hit rate stands beside it."""
        fleet = dataclasses.replace(self.fleet, **settings)
        rate = rate_each * fleet.servers
        simulation = simulate(fleet, self.draw(rate))
        simulation.check()
        row = summarise(simulation, self.settled_after)
        if row["full_caches"] < fleet.servers:
            raise PerfError(f"seconds: expected enough to fill caches of {fleet.budget:g} users, got {self.seconds:g}")
        expected = Reuse(self.visitors, rate).hit_rate_of(fleet.servers * fleet.budget)
        del row["hit_rates"], row["requests"]
        return {
            "policy": fleet.policy, "servers": fleet.servers, "budget": fleet.budget, "points": fleet.points,
            "factor": fleet.factor if fleet.policy is Policy.BOUNDED else None, "rate_each": rate_each,
            "expected_hit_rate": expected,
        } | row  # fmt: skip

    def weigh_rings(self, points: int) -> Row:
        """Return how much more than the mean the busiest server gets, over several rings: of users, and of requests."""
        visits = self.draw(RATE_EACH * self.fleet.servers)
        users, requests = np.unique(visits.users, return_counts=True)
        busiest: dict[str, list[float]] = {"users": [], "requests": []}
        for place in range(RINGS):
            first = place * SERVERS  # other servers, other points
            ring = Ring(range(first, first + SERVERS), points)
            owners = ring.find_servers(users) - first
            for name, weights in (("users", None), ("requests", requests)):
                shares = np.bincount(owners, weights, minlength=SERVERS)
                busiest[name].append(float(shares.max() / shares.mean()))
        return {"points": points, "rings": RINGS} | {
            f"{name}_{what}": float(measure(values))
            for name, values in busiest.items()
            for what, measure in (("mean", np.mean), ("worst", np.max))
        }

    def lose(self, servers: int, policy: Policy) -> Row:
        """Lose some servers at once, and get them back later, empty."""
        lost, back = LOST_AFTER * self.seconds, BACK_AFTER * self.seconds
        changes = [Change(lost, each, is_up=False) for each in range(servers)]
        changes += [Change(back, each, is_up=True) for each in range(servers)]
        visits = self.draw(RATE_EACH * self.fleet.servers)
        simulation = simulate(dataclasses.replace(self.fleet, policy=policy, changes=tuple(changes)), visits)
        simulation.check()
        times, rates = follow_hits(simulation, STEP_SECONDS)
        users = np.unique(visits.users)
        settled = find_mean(times, rates, (lost + back) / 2, back)
        before = find_mean(times, rates, lost - 5 * STEP_SECONDS, lost)
        return {
            "lost": servers, "policy": policy, "lost_at": lost, "back_at": back,
            "moved": count_moved(simulation.rings[0], simulation.rings[servers], users),
            "times": times, "hit_rates": rates, "before": before,
            "lowest": min(rate for moment, rate in zip(times, rates, strict=True) if lost < moment < back),
            "settled": settled, "recovered_after": find_recovery(times, rates, settled, lost),
            "p99_before": find_p99(simulation, lost / 2, lost), "p99_while_lost": find_p99(simulation, lost, back),
        }  # fmt: skip

    def draw(self, rate: float) -> Visits:
        """Return the visits at this rate, the same each time."""
        if rate not in self._visits:
            self._visits[rate] = draw_visits(self.visitors, rate, self.seconds, self.seed)
        return self._visits[rate]


def find_mean(times: Sequence[float], rates: Sequence[float], begin: float, end: float) -> float:
    """Return the mean rate between two moments."""
    return float(np.mean([rate for moment, rate in zip(times, rates, strict=True) if begin < moment < end]))


def find_recovery(times: Sequence[float], rates: Sequence[float], settled: float, lost: float) -> float:
    """Return the seconds until a step's hit rate is, within a little, what it then stays at; 0 if it never fell."""
    half = STEP_SECONDS / 2
    steps = [(moment, rate) for moment, rate in zip(times, rates, strict=True) if moment > lost]
    return next(moment - half - lost for moment, rate in steps if rate >= settled - RECOVERED_WITHIN)


def find_p99(simulation: Simulation, begin: float, end: float) -> float:
    """Return the latency that 1% of the requests between two moments exceed."""
    first, last = np.searchsorted(simulation.visits.seconds, [begin, end])
    return float(np.percentile(simulation.latencies[first:last], 99))
