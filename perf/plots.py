"""The plots of a result: each answers one question and says its regime under the title."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")

Result = dict[str, Any]
Series = tuple[str, str, list[float], list[str]]

SHARED, FULL, CLAIM, IDEAL = "#0b6e4f", "#b23a48", "#8d99ae", "#3d5a80"
PEER_COLOURS = (SHARED, "#b23a48", "#e09f3e", "#3d5a80", "#8d99ae")
# The schemes of the memory measurement by their keys in result files.
SCHEME_NAMES = {"shared": "shared", "traditional": "full recomputation", "ort_expanded": "ORT, expanded"}
PEER_NAMES = {
    "shared": "kvcast",
    "ort_expanded": "ORT, past KV expanded",
    "torch_expanded": "torch SDPA, KV expanded",
    "torch_flash": "torch flash + LSE",
    "torch_flash_compiled": "torch flash + LSE, compiled",
}


def draw_all(result: Result, folder: Path) -> list[Path]:
    """Draw every plot that the result has data for; return the files."""
    drawings: dict[str, Callable[[Axes, Result], None]] = {
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
        if axes.get_legend_handles_labels()[0] and axes.get_legend() is None:
            axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        figure.suptitle(axes.get_title(), fontsize=15, fontweight="bold")
        axes.set_title(regime(result), fontsize=8, color="#555555")
        files.append(folder / f"{result['name']}-{name}.png")
        figure.savefig(files[-1], dpi=130)
    return files


def regime(result: Result) -> str:
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


def draw_speedup(axes: Axes, result: Result) -> None:
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
        text = f"{row['speedup']:.{0 if row['speedup'] >= 10 else 1}f}×{'*' * row['traditional_is_extrapolated']}"
        place = (row["candidates"], row["speedup"])
        axes.annotate(text, place, textcoords="offset points", xytext=(6, -14), color=SHARED, fontweight="bold")
    use_log_scales(axes, counts)
    axes.set_xlabel("candidates N" + "   (* full recomputation extrapolated)" * has_extrapolation(rows))
    axes.set_ylabel("full recomputation ÷ shared")


def draw_history_growth(axes: Axes, result: Result) -> None:
    """What does a longer history cost?"""
    rows = result["history_growth"]
    lengths = [row["history"] for row in rows]
    axes.set_title(f"Latency as the history grows, N = {rows[0]['candidates']}")
    for key, label, colour in (("traditional", "full recomputation", FULL), ("shared", "shared", SHARED)):
        seconds = [row[f"{key}_seconds"] for row in rows]
        axes.plot(lengths, seconds, marker="o", color=colour, label=label, linewidth=2.2)
        for length, value in zip(lengths, seconds, strict=True):
            text = f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
            axes.annotate(text, (length, value), textcoords="offset points", xytext=(0, 8), ha="center", color=colour)
    use_log_scales(axes, lengths)
    axes.minorticks_off()
    axes.set_xlabel("history L" + "   (full recomputation extrapolated if too slow)" * has_extrapolation(rows))
    axes.set_ylabel("seconds a request, served")
    axes.margins(y=0.2)


def use_log_scales(axes: Axes, ticks: list[int]) -> None:
    """Scale both axes by logarithm, with a tick at each measured size."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def has_extrapolation(rows: list[Result]) -> bool:
    """Whether a time of full recomputation was extrapolated."""
    return any(row["traditional_is_extrapolated"] for row in rows)


def draw_memory(axes: Axes, result: Result) -> None:
    """What does a request add to memory?"""
    rows = result["memory"]
    labels = [f"{SCHEME_NAMES[row['scheme']]}\nN = {row['candidates']}" for row in rows]
    colours = {"traditional": FULL, "ort_expanded": "#e09f3e", "shared": SHARED}
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


def draw_stages(axes: Axes, result: Result) -> None:
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


def draw_load(axes: Axes, result: Result) -> None:
    """What happens under load?"""
    load = result["load"]
    axes.set_title(f"Latency under load, N = {load['candidates']}")
    in_flight = "requests in flight: " + ", ".join(str(row["concurrency"]) for row in load["closed_loop"])
    for rows, x, label, colour in (
        (load["closed_loop"], "throughput", in_flight, FULL),
        (load["open_loop"], "rate", "Poisson arrivals", SHARED),
    ):
        rates = [row[x] for row in rows]
        axes.plot(rates, [1e3 * row["p50"] for row in rows], marker="o", color=colour, label=f"{label}, p50")
        axes.plot(rates, [1e3 * row["p99"] for row in rows], "--", marker="^", color=colour, label=f"{label}, p99")
    axes.set_xlabel("requests a second")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)


def draw_bars(axes: Axes, groups: list[str], series: list[Series]) -> None:
    """Draw groups of bars; a series is a label, a colour, a value for each group, and what is written over it."""
    width = 0.8 / len(series)
    for index, (label, colour, values, written) in enumerate(series):
        bars = axes.bar(
            [place + index * width for place in range(len(groups))], values, width, label=label, color=colour
        )
        axes.bar_label(bars, written, fontsize=8, padding=2)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], groups)


def draw_peers(axes: Axes, result: Result) -> None:
    """How do baselines compare?"""
    rows = result["peers"]
    axes.set_title("Encode a user and fuse N candidates: kvcast and baselines")
    series = []
    for name, colour in zip(rows[0]["peers"], PEER_COLOURS, strict=False):
        values = [1e3 * row["peers"][name].get("total", 0) for row in rows]
        written = [f"{value:.0f}" if value else "out of\nmemory" for value in values]
        series.append((PEER_NAMES.get(name, name), colour, values, written))
    draw_bars(axes, [f"N = {row['candidates']}" for row in rows], series)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds, without a server")


def draw_reuse(axes: Axes, result: Result) -> None:
    """What does a cache hit save?"""
    rows = result["reuse"]["rows"]
    axes.set_title("A returning user: latency on a cache miss (cold) and on a hit (warm)")
    series = []
    for key, label, colour in (
        ("cold_ranker", "ranker, cold", FULL),
        ("cold_ranker_resident", "ranker_resident, cold", "#e09f3e"),
        ("warm_ranker", "ranker, warm", IDEAL),
        ("warm_ranker_resident", "ranker_resident, warm", SHARED),
        ("bare_fuse", "fusion alone, ONNX Runtime without a server", CLAIM),
    ):
        values = [1e3 * row[key] for row in rows]
        series.append((label, colour, values, [f"{value:.1f}" for value in values]))
    draw_bars(axes, [f"N = {row['candidates']}" for row in rows], series)
    axes.set_ylabel("milliseconds a request")
    axes.margins(y=0.22)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def draw_trace(axes: Axes, result: Result) -> None:
    """What does a budget buy?"""
    trace = result["trace"]
    rows = trace["rows"]
    axes.set_title(f"Returning users: latency and hits by cache budget, N = {trace['traffic']['candidates']}")
    labels = [f"{row['way']}\n{row['budget_bytes'] / 1e6:.0f} MB" if row["users"] else row["way"] for row in rows]
    colours = {"no cache": FULL, "ensemble": IDEAL, "resident": SHARED}
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


def draw_endurance(axes: Axes, result: Result) -> None:
    """Does memory stay within the budget?"""
    endurance = result["endurance"]
    axes.set_title(f"Memory through {endurance['requests']} requests of changing users")
    samples = endurance["samples"]
    for model, colour in zip(endurance["beyond_budget_bytes"], (IDEAL, SHARED), strict=True):
        held = [sample["process_bytes"][model] - endurance["start_bytes"][model] for sample in samples]
        draw_bytes(axes, samples, held, f"{model}: process, beyond its start", colour)
        own = [sample["cache_bytes"][model] for sample in samples]
        draw_bytes(axes, samples, own, f"{model}: cache, as it counts", colour, ":")
    axes.axhline(endurance["budget_bytes"] / 1e6, color=FULL, linestyle="--", label="budget")
    axes.set_ylim(bottom=0)


def draw_soak(axes: Axes, result: Result) -> None:
    """Does anything grow?"""
    soak = result["soak"]
    axes.set_title(f"Memory through {sum(soak['outcomes'].values())} requests of mixed load")
    samples = soak["samples"]
    for name, colour in zip(samples[-1]["processes"], PEER_COLOURS, strict=False):
        held = [sample["processes"][name]["memory_bytes"] for sample in samples]
        draw_bytes(axes, samples, held, name, colour)
    shared = [sample["shared_memory_bytes"] for sample in samples]
    draw_bytes(axes, samples, shared, "shared memory", FULL, ":")
    axes.set_ylim(bottom=0)


def draw_bytes(
    axes: Axes, samples: list[Result], values: list[float], label: str, colour: str, style: str = "-"
) -> None:
    """Draw what was held at each sample, over minutes."""
    minutes = [sample["seconds"] / 60 for sample in samples]
    axes.plot(minutes, [value / 1e6 for value in values], style, color=colour, linewidth=2, label=label)
    axes.set_xlabel("minutes")
    axes.set_ylabel("MB")


def draw_affinity(axes: Axes, result: Result) -> None:
    """How many requests hit the cache?"""
    affinity = result["affinity"]
    axes.set_title(f"{affinity['servers']} servers behind haproxy: cache hit rate")
    series = []
    for protocol, label, colour in (("grpc", "gRPC", SHARED), ("http", "HTTP", IDEAL)):
        rates = [100 * row["hit_rate"] for row in affinity["policies"] if row["protocol"] == protocol]
        series.append((label, colour, rates, [f"{rate:.0f}%" for rate in rates]))
    draw_bars(axes, list(dict.fromkeys(row["policy"] for row in affinity["policies"])), series)
    axes.set_ylabel("% of visits")
    axes.set_ylim(0, 1.25 * max(100 * row["hit_rate"] for row in affinity["policies"]))
    axes.legend(frameon=False, ncols=2, loc="upper right")
