"""The plots of a result: each answers one question and says its regime under the title."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")

SHARED, TRADITIONAL, CLAIM, IDEAL = "#0b6e4f", "#b23a48", "#8d99ae", "#3d5a80"
PEER_COLOURS = (SHARED, "#b23a48", "#e09f3e", "#3d5a80", "#8d99ae")
PEER_NAMES = {
    "shared": "kvcast",
    "ort_expanded": "ORT, past KV expanded",
    "torch_expanded": "torch SDPA, KV expanded",
    "torch_flash": "torch flash + LSE",
    "torch_flash_compiled": "torch flash + LSE, compiled",
}


def draw_all(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every plot that the result has data for; return the files."""
    drawings: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
        "table": draw_speedup,
        "history_growth": draw_history_growth,
        "memory": draw_memory,
        "stages": draw_stages,
        "load": draw_load,
        "peers": draw_peers,
        "reuse": draw_reuse,
        "trace": draw_trace,
        "endurance": draw_endurance,
        "soak": draw_soak,
        "affinity": draw_affinity,
    }
    files = []
    for name, draw in drawings.items():
        if not result.get(name):
            continue
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, result)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        figure.suptitle(axes.get_title(), fontsize=15, fontweight="bold")
        axes.set_title(regime(result), fontsize=8, color="#555555")
        files.append(folder / f"{result['name']}-{name}.png")
        figure.savefig(files[-1], dpi=130)
    return files


def regime(result: dict[str, Any]) -> str:
    """Return one line: model, machine, threads, dtype, versions."""
    machine, config = result["machine"], result["config"]
    versions = machine["versions"]
    return (
        f"{config['name']}: L={config['history']} d={config['width']} M={config['layers']} H={config['heads']} "
        f"T={config['candidate_tokens']} · {machine['dtype']} · {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads_per_session']} threads a session\n"
        f"tritonserver {versions['tritonserver'].split()[0]}, ONNX Runtime {versions['onnxruntime']}, "
        f"torch {versions['torch']}, medians of alternating runs, {result['finished'][:10]}"
    )


def draw_speedup(axes: Axes, result: dict[str, Any]) -> None:
    """How much cheaper is a request?"""
    rows = result["table"]
    counts = [row["candidates"] for row in rows]
    axes.set_title("One shared user KV: how many times faster a request is answered")
    for key, label, colour, style in (
        ("ideal_speedup", "ideal, by FLOPs", IDEAL, "--"),
        ("speedup", "measured, served", SHARED, "-"),
        ("claimed_speedup", "claimed by the source documents", CLAIM, ":"),
    ):
        axes.plot(counts, [row[key] for row in rows], style, marker="o", color=colour, label=label, linewidth=2.2)
    for row in rows:
        mark = "*" if row["traditional_is_extrapolated"] else ""
        axes.annotate(
            f"{row['speedup']:.0f}×{mark}" if row["speedup"] >= 10 else f"{row['speedup']:.1f}×{mark}",
            (row["candidates"], row["speedup"]),
            textcoords="offset points", xytext=(6, -14), color=SHARED, fontweight="bold",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("candidates N" + ("   (* traditional extrapolated)" if has_extrapolation(rows) else ""))
    axes.set_ylabel("traditional ÷ shared")
    axes.legend(frameon=False)


def draw_history_growth(axes: Axes, result: dict[str, Any]) -> None:
    """What does a longer history cost?"""
    rows = result["history_growth"]
    lengths = [row["history"] for row in rows]
    axes.set_title(f"Latency as the history grows, N = {rows[0]['candidates']}")
    for key, label, colour in (
        ("traditional_seconds", "traditional", TRADITIONAL),
        ("shared_seconds", "shared", SHARED),
    ):
        seconds = [row[key] for row in rows]
        axes.plot(lengths, seconds, marker="o", color=colour, label=label, linewidth=2.2)
        for length, value in zip(lengths, seconds, strict=True):
            text = f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
            axes.annotate(text, (length, value), textcoords="offset points", xytext=(0, 8), ha="center", color=colour)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel(
        "history L" + ("   (traditional extrapolated where it takes too long)" if has_extrapolation(rows) else "")
    )
    axes.set_ylabel("seconds a request, served")
    axes.margins(y=0.2)
    axes.legend(frameon=False)


def draw_memory(axes: Axes, result: dict[str, Any]) -> None:
    """What does a request add to memory?"""
    rows = result["memory"]
    labels = [f"{row['scheme'].replace('_', ' ')}\nN = {row['candidates']}" for row in rows]
    colours = {"traditional": TRADITIONAL, "ort_expanded": "#e09f3e", "shared": SHARED}
    values = [(row["added_bytes"] or 0) / 1e6 for row in rows]
    axes.set_title("Peak memory that one request adds")
    bars = axes.bar(labels, values, color=[colours[row["scheme"]] for row in rows])
    axes.bar_label(bars, [f"{value:.0f} MB" if value else "failed" for value in values], padding=3)
    axes.scatter(labels, [row["copies_bytes"] / 1e6 for row in rows], marker="_", s=900, color="#222222", zorder=3)
    axes.set_yscale("log")
    axes.set_ylim(bottom=10, top=4 * max([*values, *(row["copies_bytes"] / 1e6 for row in rows)]))
    axes.plot(
        [], [], "_", color="#222222", markersize=16, label="(N - 1) × user KV: what copies of the cache would take"
    )
    axes.set_ylabel("MB")
    axes.legend(frameon=False)


def draw_stages(axes: Axes, result: dict[str, Any]) -> None:
    """Where does the time of a request go?"""
    stages = result["stages"]
    axes.set_title(f"Where a cold request's {1e3 * stages['total_seconds']:.0f} ms go, N = {stages['candidates']}")
    names = list(stages["stages_seconds"])
    values = [1e3 * stages["stages_seconds"][name] for name in names]
    bars = axes.barh(names, values, color=[SHARED if "ONNX" in name else CLAIM for name in names])
    axes.bar_label(bars, [f"{value:.1f} ms" for value in values], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds (medians; {100 * stages['outside_onnxruntime_share']:.0f}% outside ONNX Runtime)")
    axes.margins(x=0.12)


def draw_load(axes: Axes, result: dict[str, Any]) -> None:
    """What happens under load?"""
    load = result["load"]
    axes.set_title(f"Latency under load, N = {load['candidates']}")
    for rows, x, label, colour in (
        (load["closed_loop"], "throughput", "requests in flight: " + ", ".join(
            str(row["concurrency"]) for row in load["closed_loop"]), TRADITIONAL),
        (load["open_loop"], "rate", "Poisson arrivals", SHARED),
    ):  # fmt: skip
        rates = [row[x] for row in rows]
        axes.plot(rates, [1e3 * row["p50"] for row in rows], marker="o", color=colour, label=f"{label}, p50")
        axes.plot(rates, [1e3 * row["p99"] for row in rows], "--", marker="^", color=colour, label=f"{label}, p99")
    axes.set_xlabel("requests a second")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def draw_peers(axes: Axes, result: dict[str, Any]) -> None:
    """How do other ways of writing it compare?"""
    rows = result["peers"]
    names = list(rows[0]["peers"])
    axes.set_title("Encode a user and fuse N candidates: kvcast and what else one would write")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + index * width for place in range(len(rows))]
        values = [1e3 * row["peers"][name].get("total", 0) for row in rows]
        bars = axes.bar(places, values, width, label=PEER_NAMES.get(name, name), color=PEER_COLOURS[index])
        axes.bar_label(bars, [f"{value:.0f}" if value else "out of\nmemory" for value in values], fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(rows))], [f"N = {row['candidates']}" for row in rows]
    )
    axes.set_ylabel("milliseconds, without a server")
    axes.legend(frameon=False, fontsize=8)


def draw_reuse(axes: Axes, result: dict[str, Any]) -> None:
    """What is saved when a user comes back?"""
    rows = result["reuse"]["rows"]
    axes.set_title("The same user again: latency with the KV made, and with the KV kept")
    bars = (
        ("cold_ranker", "ranker, cold", TRADITIONAL),
        ("cold_ranker_resident", "ranker_resident, cold", "#e09f3e"),
        ("warm_ranker", "ranker, warm", IDEAL),
        ("warm_ranker_resident", "ranker_resident, warm", SHARED),
        ("bare_fuse", "fusion alone, ONNX Runtime without a server", CLAIM),
    )
    width = 0.8 / len(bars)
    for index, (key, label, colour) in enumerate(bars):
        places = [place + index * width for place in range(len(rows))]
        drawn = axes.bar(places, [1e3 * row[key] for row in rows], width, label=label, color=colour)
        axes.bar_label(drawn, [f"{1e3 * row[key]:.1f}" for row in rows], fontsize=8, padding=2)
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(rows))], [f"N = {row['candidates']}" for row in rows]
    )
    axes.set_ylabel("milliseconds a request")
    axes.margins(y=0.22)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def draw_trace(axes: Axes, result: dict[str, Any]) -> None:
    """What does a budget buy?"""
    trace = result["trace"]
    rows = trace["rows"]
    axes.set_title(f"Returning users: latency and hits by cache budget, N = {trace['traffic']['candidates']}")
    labels = [f"{row['way']}\n{row['budget_bytes'] / 1e6:.0f} MB" if row["users"] else row["way"] for row in rows]
    colours = {"no cache": TRADITIONAL, "ensemble": IDEAL, "resident": SHARED}
    width = 0.4
    for offset, key, alpha in ((0, "p50", 1.0), (width, "p99", 0.45)):
        places = [place + offset for place in range(len(rows))]
        values = [1e3 * row[key] for row in rows]
        bars = axes.bar(places, values, width, color=[colours[row["way"]] for row in rows], alpha=alpha)
        axes.bar_label(bars, [f"{key}\n{value:.0f}" for value in values], fontsize=8, padding=2)
    for place, row in enumerate(rows):
        text = f"{100 * row['hit_rate']:.0f}% hits\n{row['throughput']:.0f}/s"
        axes.annotate(text, (place + width / 2, 0), textcoords="offset points", xytext=(0, 6), ha="center",
                      fontsize=8, color="white", fontweight="bold")  # fmt: skip
    axes.set_xticks([place + width / 2 for place in range(len(rows))], labels, fontsize=8)
    axes.margins(y=0.15)
    axes.set_ylabel(f"milliseconds, {trace['in_flight']} requests in flight")


def draw_endurance(axes: Axes, result: dict[str, Any]) -> None:
    """Does memory stay where it should?"""
    endurance = result["endurance"]
    minutes = [sample["seconds"] / 60 for sample in endurance["samples"]]
    axes.set_title(f"Memory through {endurance['requests']} requests of changing users")
    for keeper, colour in zip(endurance["beyond_budget_bytes"], (IDEAL, SHARED), strict=True):
        start = endurance["start_bytes"][keeper] / 1e6
        held = [sample["process_bytes"][keeper] / 1e6 - start for sample in endurance["samples"]]
        axes.plot(minutes, held, color=colour, linewidth=2, label=f"{keeper}: process, beyond its start")
        own = [sample["cache_bytes"][keeper] / 1e6 for sample in endurance["samples"]]
        axes.plot(minutes, own, ":", color=colour, linewidth=2, label=f"{keeper}: cache, as it counts")
    axes.axhline(endurance["budget_bytes"] / 1e6, color=TRADITIONAL, linestyle="--", label="budget")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("MB")
    axes.legend(frameon=False, fontsize=8)


def draw_soak(axes: Axes, result: dict[str, Any]) -> None:
    """Does anything grow?"""
    soak = result["soak"]
    minutes = [sample["seconds"] / 60 for sample in soak["samples"]]
    axes.set_title(f"Memory through {sum(soak['outcomes'].values())} requests of mixed load")
    for name, colour in zip(soak["samples"][-1]["processes"], PEER_COLOURS, strict=False):
        held = [sample["processes"][name]["memory_bytes"] / 1e6 for sample in soak["samples"]]
        axes.plot(minutes, held, color=colour, linewidth=2, label=name)
    shared = [sample["shared_memory_bytes"] / 1e6 for sample in soak["samples"]]
    axes.plot(minutes, shared, ":", color=TRADITIONAL, linewidth=2, label="shared memory")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("MB")
    axes.legend(frameon=False, fontsize=8)


def has_extrapolation(rows: list[dict[str, Any]]) -> bool:
    """Whether a traditional time was computed and not measured."""
    return any(row["traditional_is_extrapolated"] for row in rows)


def draw_affinity(axes: Axes, result: dict[str, Any]) -> None:
    """How many find their user again?"""
    affinity = result["affinity"]
    policies = list(dict.fromkeys(row["policy"] for row in affinity["policies"]))
    axes.set_title(f"{affinity['servers']} servers behind haproxy: visits that find their user kept")
    for place, (protocol, colour) in enumerate((("grpc", SHARED), ("http", IDEAL))):
        rates = {row["policy"]: 100 * row["hit_rate"] for row in affinity["policies"] if row["protocol"] == protocol}
        bars = axes.bar(
            [index + 0.36 * (place - 0.5) for index in range(len(policies))],
            [rates[policy] for policy in policies],
            width=0.34,
            color=colour,
            label={"grpc": "gRPC", "http": "HTTP"}[protocol],
        )
        axes.bar_label(bars, fmt="%.0f%%", fontsize=10, padding=4)
    axes.set_xticks(range(len(policies)), policies)
    axes.set_ylabel("% of visits")
    axes.set_ylim(0, 1.25 * max(100 * row["hit_rate"] for row in affinity["policies"]))
    axes.legend(frameon=False, ncols=2, loc="upper right")
