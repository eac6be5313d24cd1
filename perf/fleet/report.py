"""The report and the plots of a study of many servers (`kvcast perf simulate --study`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvcast.perf.fleet.capacity import LONGEST_SECONDS
from kvcast.perf.fleet.plan import say_time
from kvcast.perf.plots import CLAIM, IDEAL, SHARED, TRADITIONAL
from kvcast.perf.report import make_table

Row = dict[str, Any]
# What marks such a result.
KIND = "fleet"
RING_COLUMNS = ("users_mean", "users_worst", "requests_mean", "requests_worst")
ORANGE = "#e09f3e"
NAMES = {"affinity": "by user", "bounded": "by user, bounded", "round-robin": "round robin"}


def say_share(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f}%"


def say_scenario(result: Row) -> str:
    """Return one line: servers, load, visitors, seconds of a ranking."""
    scenario, who, measured = result["scenario"], result["visitors"], result["measured"]
    warm, cold = 1e3 * measured["warm_seconds"], 1e3 * measured["cold_seconds"]
    return (
        f"if not said otherwise {scenario['servers']} servers, each with {scenario['rate_each']:g} requests/s and room "
        f"for {scenario['budget']:g} users · {measured['config']}, {measured['model']}, L={measured['history']} "
        f"N={measured['candidates']}: {warm:.1f} ms kept, {cold:.1f} ms encoded\n{who['users']:,} users, Zipf "
        f"{who['exponent']:g}; next page {who['returns']:g} after {who['page_seconds']:g} s; unchanged at the next "
        f"visit {who['unchanged']:g} · simulated, {result['finished'][:10]}"
    )


# ---- the report -----------------------------------------------------------------------------------------------------


def write_fleet(result: Row) -> str:
    """Return the report."""
    scenario = result["scenario"]
    parts = [
        "# Many servers, simulated",
        say_scenario(result).replace("\n", "  \n"),
        (
            f"Made by `{result['command']}` in {result['seconds'] / 60:.0f} minutes; everything raw is in "
            f"`{result['name']}.json`. Each line sends {scenario['seconds']:g} seconds of traffic to exact LRU caches "
            "and queues that answer one request at a time, and counts from "
            f"{scenario['settled_after']:g} s on, when caches are full. The seconds of a ranking are those of "
            f"{', '.join(f'`{Path(each).name}`' for each in result['measured']['results'])}. The proxy does what "
            "haproxy 2.6 does with `hash-type consistent`, in whose words the factor is `hash-balance-factor` ÷ 100 "
            "and a server's points are 16 × its `weight`."
        ),
        write_policies(result),
        write_budget(result),
        f"![budget]({result['name']}-budget.png)",
        write_servers(result),
        f"![servers]({result['name']}-servers.png)",
        write_factor(result),
        f"![factor]({result['name']}-factor.png)",
        write_points(result),
        write_loss(result),
        f"![loss]({result['name']}-loss.png)",
    ]
    return "\n\n".join(parts) + "\n"


def write_policies(result: Row) -> str:
    """The three ways to choose a server."""
    rows = [
        [
            name_policy(row), say_share(row["hit_rate"]), say_share(row["elsewhere"]), f"{row['imbalance']:.2f}",
            say_share(row["utilisation"]), say_share(row["highest_utilisation"]),
            say_time(row["mean_seconds"]), say_time(row["p99_seconds"]),
        ]
        for row in result["policies"]
    ]  # fmt: skip
    header = ["server chosen", "hits", "not at the user's own", "busiest ÷ mean", "busy", "busiest", "mean", "p99"]
    return f"## What affinity is worth\n\n{make_table(header, rows)}"


def write_budget(result: Row) -> str:
    """Hit rate against budget."""
    by_budget: dict[float, dict[str, Row]] = {}
    for row in result["budget"]:
        by_budget.setdefault(row["budget"], {})[row["policy"]] = row
    rows = [
        [
            f"{budget:g}", say_share(each["affinity"]["hit_rate"]), say_share(each["affinity"]["expected_hit_rate"]),
            say_share(each["round-robin"]["hit_rate"]),
        ]
        for budget, each in by_budget.items()
    ]  # fmt: skip
    worst = max(
        abs(row["hit_rate"] - row["expected_hit_rate"]) for row in result["budget"] if row["policy"] == "affinity"
    )
    header = ["users a server", "hits, by user", "the formula's", "hits, round robin"]
    return (
        f"## What a budget buys\n\n{make_table(header, rows)}\n\nThe formula (`perf/fleet/capacity.py`, which "
        f"`kvcast perf plan` uses) is off by at most {100 * worst:.1f} points. Further pages of a visit come within "
        "seconds and need little room; the next visit comes after hours, and needs room for everybody who comes "
        "meanwhile."
    )


def write_servers(result: Row) -> str:
    """Hit rate against the number of servers."""
    by_count: dict[int, dict[str, Row]] = {}
    for row in result["servers"]:
        by_count.setdefault(row["servers"], {})[row["policy"]] = row
    rows = [
        [str(count), say_share(each["affinity"]["hit_rate"]), say_share(each["round-robin"]["hit_rate"])]
        for count, each in by_count.items()
    ]
    return "## As servers and load grow together\n\n" + make_table(["servers", "by user", "round robin"], rows)


def write_factor(result: Row) -> str:
    """Bounded load."""
    rows = [
        [
            f"{row['rate_each']:g}", f"{row['factor']:g}" if row["factor"] else "none", f"{row['in_flight']:.1f}",
            say_share(row["hit_rate"]), say_share(row["elsewhere"]), f"{row['imbalance']:.2f}",
            say_share(row["utilisation"]), say_share(row["highest_utilisation"]), say_time(row["p99_seconds"]),
        ]
        for row in result["factor"]
    ]  # fmt: skip
    header = ["requests/s a server", "factor", "in flight a server", "hits", "not at the user's own", "busiest ÷ mean"]
    header += ["busy", "busiest", "p99"]
    return (
        f"## Bounded load\n\n{make_table(header, rows)}\n\nThe bound counts requests in flight. Where a server has "
        "about one, a factor near 1 lets it have that one only, and users are sent away from where they are kept: what "
        "is meant to level load makes more of it. Factors of 3 to 4 keep most of the hits and take the worst off the "
        "tail. A factor of the number of servers or more bounds nothing."
    )


def write_points(result: Row) -> str:
    """Points on the ring."""
    rows = [
        [f"{row['points'] / 16:g}", str(row["points"]), *(f"{row[name]:.2f}" for name in RING_COLUMNS)]
        for row in result["points"]
    ]
    header = ["weight", "points", "users, busiest ÷ mean", "worst ring", "requests, busiest ÷ mean", "worst ring"]
    return (
        f"## Points of a server on the ring\n\n{make_table(header, rows)}\n\nMean and worst of "
        f"{result['points'][0]['rings']} rings. What many points do not level are the most frequent users, each of "
        "whom has one server."
    )


def write_loss(result: Row) -> str:
    """Servers that are lost, and come back."""
    rows = [
        [
            str(row["lost"]), name_policy(row), say_share(row["moved"]), say_share(row["before"]),
            say_share(row["lowest"]), say_share(row["settled"]), f"{row['recovered_after']:.0f} s",
            say_time(row["p99_before"]), say_time(row["p99_while_lost"]),
        ]
        for row in result["loss"]
    ]  # fmt: skip
    header = ["lost", "server chosen", "users moved", "hits before", "lowest", "hits then", "reached within"]
    header += ["p99 before", "p99 while lost"]
    return (
        f"## When servers are lost\n\n{make_table(header, rows)}\n\nOf {result['scenario']['servers']} servers. Hit "
        "rates are those of 20 seconds; fewer servers have room for fewer users, so the rate stays a little lower "
        "until they are back."
    )


def name_policy(row: Row) -> str:
    """Return the policy in words, with its factor where it is a row's own."""
    name = NAMES[row["policy"]]
    return f"{name} ({row['factor']:g})" if row.get("factor") else name


# ---- the plots ------------------------------------------------------------------------------------------------------


def draw_fleet(result: Row, folder: Path) -> list[Path]:
    """Draw every plot; return the files."""
    drawings: dict[str, tuple[str, tuple[Callable[[Axes, Row], None], ...]]] = {
        "budget": ("Users found, by the room of each server's cache", (draw_budget,)),
        "servers": ("Users found, as servers and load grow together", (draw_servers,)),
        "factor": ("What a bound on load costs, and what it buys", (draw_factor_hits, draw_factor_tail)),
        "loss": ("Users found when servers are lost, and when they come back empty", (draw_loss,)),
    }
    files = []
    for name, (title, draws) in drawings.items():
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        for place, draw in enumerate(draws):
            axes = figure.add_subplot(1, len(draws), place + 1)
            draw(axes, result)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.25)
        figure.suptitle(title, fontsize=15, fontweight="bold")
        figure.text(0.5, -0.01, say_scenario(result), fontsize=8, color="#555555", ha="center", va="top")
        files.append(folder / f"{result['name']}-{name}.png")
        figure.savefig(files[-1], dpi=130, bbox_inches="tight")
    return files


def pick(rows: list[Row], x: str, y: str, **wanted: Any) -> tuple[list[float], list[float]]:
    """Return two columns of the rows that have these values."""
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [row[x] for row in chosen], [100 * row[y] for row in chosen]


def draw_budget(axes: Axes, result: Row) -> None:
    """What does a budget buy?"""
    rows = result["budget"]
    axes.plot(*pick(rows, "budget", "hit_rate", policy="affinity"), marker="o", color=SHARED, linewidth=2.2,
              label="server chosen by user")  # fmt: skip
    axes.plot(*pick(rows, "budget", "expected_hit_rate", policy="affinity"), "--", color=IDEAL, linewidth=1.6,
              label="the formula of kvcast perf plan")  # fmt: skip
    axes.plot(*pick(rows, "budget", "hit_rate", policy="round-robin"), marker="o", color=TRADITIONAL, linewidth=2.2,
              label="round robin")  # fmt: skip
    who = result["visitors"]
    for height, text in (
        (who["returns"], "every further page of a visit"),
        (who["returns"] + (1 - who["returns"]) * who["unchanged"], "and every visit with an unchanged history"),
    ):
        axes.axhline(100 * height, color=CLAIM, linestyle=":", linewidth=1.2)
        axes.annotate(
            text,
            (rows[0]["budget"], 100 * height),
            textcoords="offset points",
            xytext=(0, 4),
            color="#666666",
            fontsize=8,
        )
    budgets = sorted({row["budget"] for row in rows})
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.set_ylim(0, 90)
    axes.set_xlabel("users that a server has room for")
    axes.set_ylabel("requests whose user is found, %")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.42))


def draw_servers(axes: Axes, result: Row) -> None:
    """What happens as the fleet grows?"""
    rows = result["servers"]
    for policy, colour in (("affinity", SHARED), ("round-robin", TRADITIONAL)):
        counts, hits = pick(rows, "servers", "hit_rate", policy=policy)
        axes.plot(counts, hits, marker="o", color=colour, linewidth=2.2, label=f"server chosen: {NAMES[policy]}")
        for count, hit in zip(counts, hits, strict=True):
            axes.annotate(f"{hit:.0f}%", (count, hit), textcoords="offset points", xytext=(5, 7), color=colour)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(counts, [f"{count:g}" for count in counts])
    axes.set_ylim(0, 70)
    axes.set_xlabel("servers")
    axes.set_ylabel("requests whose user is found, %")
    axes.legend(frameon=False, loc="center right")


def draw_factor(axes: Axes, result: Row, key: str, scale: float) -> None:
    """Draw one number against the factor, for each load."""
    rows = result["factor"]
    factors = sorted({row["factor"] for row in rows if row["factor"]})
    for rate, colour in zip(sorted({row["rate_each"] for row in rows}), (SHARED, ORANGE), strict=True):
        own = sorted(
            (row for row in rows if row["rate_each"] == rate), key=lambda row: float(row["factor"] or LONGEST_SECONDS)
        )
        busy = own[-1]["utilisation"]
        axes.plot(range(len(own)), [scale * row[key] for row in own], marker="o", color=colour, linewidth=2.2,
                  label=f"{rate:g} requests/s a server: {100 * busy:.0f}% busy without bound")  # fmt: skip
    axes.set_xticks(range(len(factors) + 1), [*(f"{factor:g}" for factor in factors), "none"])
    axes.set_xlabel("factor (hash-balance-factor ÷ 100)")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.25)


def draw_factor_hits(axes: Axes, result: Row) -> None:
    """What does a bound cost?"""
    draw_factor(axes, result, "hit_rate", 100)
    axes.set_ylabel("requests whose user is found, %")
    axes.set_ylim(0, 66)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def draw_factor_tail(axes: Axes, result: Row) -> None:
    """What does it buy?"""
    draw_factor(axes, result, "p99_seconds", 1e3)
    axes.set_ylabel("p99 of a ranking, ms")


def draw_loss(axes: Axes, result: Row) -> None:
    """What does a lost server do to the others?"""
    rows = result["loss"]
    for row, colour in zip(rows, (SHARED, TRADITIONAL, IDEAL), strict=True):
        style = "-" if row["policy"] == "bounded" else ":"
        label = f"{row['lost']} of {result['scenario']['servers']} lost, {NAMES[row['policy']]}"
        minutes, hits = [moment / 60 for moment in row["times"]], [100 * rate for rate in row["hit_rates"]]
        axes.plot(minutes, hits, style, color=colour, linewidth=1.8, label=label)
    for moment, text in ((rows[0]["lost_at"], "lost"), (rows[0]["back_at"], "back")):
        axes.axvline(moment / 60, color="#222222", linewidth=1)
        axes.annotate(text, (moment / 60, 57.5), textcoords="offset points", xytext=(4, 0))
    axes.set_ylim(30, 60)
    axes.set_xlim(left=rows[0]["lost_at"] / 120)
    axes.set_xlabel("minutes")
    axes.set_ylabel("requests whose user is found, % of 20 seconds")
    axes.legend(frameon=False, loc="lower right")
