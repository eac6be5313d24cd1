"""`kvcast perf plan`: how many servers, how much memory and money, from measured times and what is known of visitors.

It puts `capacity`'s formulas and a file's measurements together, and shows each formula with its numbers.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from kvcast.contract.schema import KVLayout
from kvcast.network.attention import make_layout
from kvcast.perf.fleet.capacity import LONGEST_SECONDS, Reuse, Service, Visitors, count_servers, expect, find_servers
from kvcast.perf.fleet.measured import Measurements, choose_size, read_measurements

Row = dict[str, Any]
# The busiest of the servers that a proxy hashes users to has up to a quarter more than the mean
# (`perf/results/fleet.md`), and at 75% it makes a request wait for one and a half others on average.
UTILISATION = 0.6
# A kept user's history and bookkeeping beside the KV.
BESIDE_KV = 1.01
MILLION, HOUR = 1e6, 3600


def add_visitor_options(parser: argparse.ArgumentParser) -> None:
    """Add what describes visitors; the defaults are guesses, to be replaced by what is known."""
    known = Visitors(1)
    parser.add_argument(
        "--zipf",
        type=float,
        default=known.exponent,
        metavar="S",
        help="exponent of Zipf's law over users (%(default)s)",
    )
    parser.add_argument(
        "--returns",
        type=float,
        default=known.returns,
        metavar="P",
        help="probability that a request is followed by another page of the same visit (%(default)s)",
    )
    parser.add_argument(
        "--page-seconds", type=float, default=known.page_seconds, metavar="S", help="mean time until it (%(default)s)"
    )
    parser.add_argument(
        "--unchanged",
        type=float,
        default=known.unchanged,
        metavar="P",
        help="probability that the history is the same at the user's next visit (%(default)s)",
    )


def read_visitors(arguments: argparse.Namespace) -> Visitors:
    """Return the visitors that the options describe."""
    return Visitors(arguments.users, arguments.zipf, arguments.returns, arguments.page_seconds, arguments.unchanged)


def add_parser(commands: Any) -> None:
    """Add the command."""
    plan = commands.add_parser(
        "plan",
        help="servers, memory, cache and cost for so many users and requests; runs nothing",
        description="Say how many servers it takes, from measured times; every formula is shown with its numbers.",
    )
    plan.add_argument("--from", dest="results", type=Path, nargs="+", required=True, metavar="RESULT.json",
                      help="result files of one configuration; the first that has a number gives it")  # fmt: skip
    plan.add_argument("--users", type=int, required=True, help="who may come")
    plan.add_argument("--qps", type=float, required=True, metavar="RATE", help="requests a second, at the busiest time")
    plan.add_argument("--candidates", type=int, metavar="N", help="of a request (the configuration's)")
    plan.add_argument("--history", type=int, metavar="L", help="events of a user (the configuration's)")
    keep = plan.add_mutually_exclusive_group(required=True)
    keep.add_argument("--hit-rate", type=float, metavar="SHARE", help="users found in a cache; says the budget")
    keep.add_argument("--budget", type=float, metavar="MB", help="of a server's cache; says the hit rate")
    add_visitor_options(plan)
    plan.add_argument("--workers", type=int, default=1, metavar="W",
                      help="model processes a server, each with the cores that were measured")  # fmt: skip
    plan.add_argument("--utilisation", type=float, default=UTILISATION, metavar="SHARE",
                      help="of a server's time at the busiest time (%(default)s)")  # fmt: skip
    plan.add_argument("--spare", type=int, default=1, help="servers that may be lost (%(default)s)")
    plan.add_argument("--price-per-hour", type=float, metavar="PRICE", help="of one server, in any currency")
    plan.add_argument("--json", action="store_true", help="for programs")


def run_plan(arguments: argparse.Namespace) -> None:
    """Print the plan."""
    plan = make_plan(arguments, read_measurements(arguments.results))
    print(json.dumps(plan, indent=1) if arguments.json else describe_plan(plan))


def read_layout(config: Row) -> KVLayout:
    """Return the layout of the user KV that was measured; older results do not say it, and had attention's own."""
    if "user_kv" in config:
        return KVLayout(**config["user_kv"])
    return make_layout(config["layers"], config["heads"], config["width"] // config["heads"])


def make_plan(arguments: argparse.Namespace, measured: Measurements) -> Row:
    """Return every number of the plan.

    Raises:
        PerfError: what is asked for cannot be.
    """
    check_options(arguments)
    qps, workers, spare = arguments.qps, arguments.workers, arguments.spare
    config = measured.config
    history, candidates = choose_size(config, arguments.history, arguments.candidates)
    warm, cold = measured.estimate_warm(history, candidates), measured.estimate_cold(history, candidates)
    user_bytes = BESIDE_KV * read_layout(config).bytes_of(history)
    reuse = Reuse(read_visitors(arguments), qps)
    servers, hit_rate, users_each = choose_servers(arguments, reuse, warm.seconds, cold.seconds, user_bytes)
    service = Service(warm.seconds, cold.seconds, hit_rate)
    busy = qps * service.mean / (servers * workers)
    million = MILLION * (servers + spare) / qps
    traditional = measured.estimate_traditional(history, candidates)
    compared = count_servers(qps, traditional.seconds, workers, arguments.utilisation) + spare
    return {
        "model": measured.model,
        "config": config["name"],
        "machine": f"{measured.machine['processor']}, {measured.machine['cores']} cores",
        "results": list(map(str, arguments.results)),
        "qps": qps, "history": history, "candidates": candidates, "visitors": vars(reuse.visitors),
        "workers": workers, "utilisation": arguments.utilisation,
        "warm_seconds": warm.seconds, "warm_source": warm.source,
        "cold_seconds": cold.seconds, "cold_source": cold.source,
        "hit_rate": hit_rate, "hit_rate_is_given": arguments.hit_rate is not None,
        "seconds_kept": reuse.time_kept(users_each * servers),
        "users_kept": users_each * servers, "users_kept_each": users_each, "user_bytes": user_bytes,
        "service_seconds": service.mean,
        "servers_busy": servers, "servers_spare": spare, "servers": servers + spare,
        "busy": busy, "busy_all": busy * servers / (servers + spare),
        "latency_mean_seconds": service.mean + service.mean_wait(busy),
        "latency_p99_seconds": service.cold + service.long_wait(busy),
        **count_memory(measured, users_each * user_bytes, workers, measured.find_run_bytes(history, candidates)),
        "server_seconds_a_million": million,
        "price_per_hour": arguments.price_per_hour,
        "price_a_million": arguments.price_per_hour and arguments.price_per_hour * million / HOUR,
        "traditional": {
            "seconds": traditional.seconds, "source": traditional.source,
            "servers": compared, "server_seconds_a_million": MILLION * compared / qps,
        },
    }  # fmt: skip


def check_options(arguments: argparse.Namespace) -> None:
    """Check what the formulas do not check themselves.

    Raises:
        PerfError: a number cannot be.
    """
    expect(0 < arguments.utilisation < 1, "utilisation", "a share between 0 and 1", arguments.utilisation)
    expect(arguments.workers >= 1, "workers", "at least 1", arguments.workers)
    # Each process keeps users of its own, and the guard lets a user come to any of them.
    keeps = bool(arguments.budget or arguments.hit_rate)
    expect(arguments.workers == 1 or not keeps, "workers", "1, or no cache (--budget 0)", arguments.workers)
    expect(arguments.spare >= 0, "spare", "at least 0", arguments.spare)
    expect(arguments.budget is None or arguments.budget >= 0, "budget", "at least 0 MB", arguments.budget)


def choose_servers(
    arguments: argparse.Namespace, reuse: Reuse, warm: float, cold: float, user_bytes: float
) -> tuple[int, float, float]:
    """Return the servers needed, the hit rate, and the users that each has room for: one of the latter two is given."""

    def enough(hit_rate: float) -> int:
        seconds = Service(warm, cold, hit_rate).mean
        return count_servers(arguments.qps, seconds, arguments.workers, arguments.utilisation)

    if arguments.hit_rate is not None:
        entries = reuse.entries_for(arguments.hit_rate)
        servers = enough(arguments.hit_rate)
        return servers, arguments.hit_rate, entries / servers
    users_each = MILLION * arguments.budget / user_bytes
    servers, hit_rate = find_servers(reuse, users_each, enough)
    return servers, hit_rate, users_each


def count_memory(measured: Measurements, budget: float, workers: int, run_bytes: int | None) -> Row:
    """Return the bytes of a server, as far as the results have them."""
    start = measured.start_bytes
    server = workers * (start + budget + (run_bytes or 0)) if start is not None else None
    return {"budget_bytes": budget, "start_bytes": start, "run_bytes": run_bytes, "server_bytes": server}


def describe_plan(plan: Row) -> str:
    """Return the plan for people: each number, and the formula that gave it."""
    hit, warm, cold = plan["hit_rate"], 1e3 * plan["warm_seconds"], 1e3 * plan["cold_seconds"]
    qps, mean, each = plan["qps"], plan["service_seconds"], plan["user_bytes"] / MILLION
    who = plan["visitors"]
    lines = [
        (
            f"{who['users']:,} users, {qps:,.10g} requests/s of N={plan['candidates']} candidates, "
            f"L={plan['history']} events: {plan['config']}, {plan['model']}"
        ),
        f"measured on {plan['machine']}: {', '.join(plan['results'])}",
        (
            f"visitors: Zipf {who['exponent']:g}, returns {who['returns']:g} after {who['page_seconds']:g} s, "
            f"unchanged at the next visit {who['unchanged']:g}"
        ),
        "",
    ]
    rows = [
        ("a ranking, user kept", say_time(plan["warm_seconds"]), plan["warm_source"]),
        ("a ranking, user encoded", say_time(plan["cold_seconds"]), plan["cold_source"]),
        (
            "hit rate",
            f"{100 * hit:.1f}%",
            "as asked" if plan["hit_rate_is_given"] else f"F(T), {describe_keeping(plan)}",
        ),
        ("a ranking", say_time(mean), f"{hit:.3f} · {warm:.4g} ms + {1 - hit:.3f} · {cold:.4g} ms"),
        (
            "servers",
            f"{plan['servers']:,}",
            (
                f"⌈{qps:,.10g}/s · {mean:.4g} s / ({plan['workers']} · {plan['utilisation']:g})⌉ = "
                f"{plan['servers_busy']:,}, and {plan['servers_spare']} that may be lost"
            ),
        ),
        ("busy", f"{100 * plan['busy_all']:.0f}%", f"{100 * plan['busy']:.0f}% with {plan['servers_busy']:,}"),
        (
            "latency, mean and p99",
            f"{say_time(plan['latency_mean_seconds'])}, {say_time(plan['latency_p99_seconds'])}",
            f"M/G/1 at {100 * plan['busy']:.0f}%: S + ρ·E[S²]/(2·S·(1 - ρ)); encoded + a wait that 1% exceed",
        ),
        ("user KV", f"{each:,.2f} MB", "keys and values in fp32, the history, 1% beside"),
        ("cache, of each process", say_bytes(plan["budget_bytes"]), describe_budget(plan)),
        ("memory of a server", say_bytes(plan["server_bytes"]), describe_memory(plan)),
        (
            "cost of a million",
            f"{plan['server_seconds_a_million']:,.0f} server-seconds",
            f"10⁶ · {plan['servers']:,} / {qps:,.10g}" + describe_price(plan),
        ),
    ]
    old = plan["traditional"]
    rows += [
        ("", "", ""),
        ("traditional, a ranking", say_time(old["seconds"]), old["source"]),
        (
            "traditional, servers",
            f"{old['servers']:,}",
            (
                f"{old['servers'] / plan['servers']:.0f} × as many; "
                f"{old['server_seconds_a_million']:,.0f} server-seconds a million"
            ),
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines += [f"  {name:<{widths[0]}}  {value:>{widths[1]}}   {how}".rstrip() for name, value, how in rows]
    return "\n".join(lines)


def describe_keeping(plan: Row) -> str:
    """Say how long a user is kept."""
    if plan["seconds_kept"] >= LONGEST_SECONDS:
        return f"everybody is kept: {plan['users_kept']:,.0f} fit"
    return f"kept for T = {say_time(plan['seconds_kept'])} after the last request: {plan['users_kept']:,.0f} users"


def describe_budget(plan: Row) -> str:
    """Say where the budget comes from."""
    kept = f"{plan['users_kept_each']:,.0f} users"
    if not plan["hit_rate_is_given"]:
        return f"as asked: {kept}"
    return f"{kept}, 1/{plan['servers_busy']:,} of those who are {describe_keeping(plan)}"


def describe_memory(plan: Row) -> str:
    """Say what memory is made of, and what of it is not known."""
    if plan["start_bytes"] is None:
        return "the files have no process memory: add a result of --experiments reuse"
    run = say_bytes(plan["run_bytes"]) + " a run" if plan["run_bytes"] else "a run's own (not in the files)"
    return (
        f"{plan['workers']} · (process {say_bytes(plan['start_bytes'])} + cache + {run}); "
        "all that a server needs: kvcast deploy size"
    )


def describe_price(plan: Row) -> str:
    """Say the price, if one is known."""
    if plan["price_per_hour"] is None:
        return ""
    return f"; {plan['price_a_million']:,.4g} at {plan['price_per_hour']:g} an hour"


def say_time(seconds: float) -> str:
    """Return a duration in the unit that people would use."""
    if seconds < 1:
        return f"{1e3 * seconds:.1f} ms"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def say_bytes(count: float | None) -> str:
    """Return a size."""
    if count is None or math.isnan(count):
        return "unknown"
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e6:,.0f} MB"
