"""The Markdown report of a result file: tables that say what was measured, beside what was claimed."""

from typing import Any

from perf.plots import PEER_NAMES, regime

TABLE_NOTE = (
    "measured × is the median of the ratios of neighbouring rounds, the times are medians of their own; gain = 1 - 1 ÷ "
    "measured; throughput drop = 40% ÷ measured, the documents' own metric (they claim 6.8% at N = 50). "
    "\\* extrapolated from the N before it. A measured ratio above the ideal is no error: the traditional graph needs "
    "its mask inside the sequence, and with a mask it cannot take ONNX Runtime's tiled attention, as the encoder does."
)


def write_report(result: dict[str, Any]) -> str:
    """Return the report."""
    parts = [
        f"# {result['name']}: shared user KV against the traditional scheme",
        regime(result).replace("\n", "  \n"),
        (
            f"Made by `{result['command']}` in "
            f"{result['seconds'] / 60:.0f} minutes; everything raw is in `{result['name']}.json`. " + say_load(result)
        ),
    ]
    sections = {
        "table": write_table,
        "fusion": write_fusion,
        "history_growth": write_history_growth,
        "memory": write_memory,
        "stages": write_stages,
        "load": write_load,
        "packing": write_packing,
        "peers": write_peers,
        "reuse": write_reuse,
        "trace": write_trace,
        "endurance": write_endurance,
        "guard": write_guard,
        "soak": write_soak,
        "affinity": write_affinity,
    }
    for name, write in sections.items():
        if result.get(name):
            parts.append(write(result))
            if name not in ("fusion", "packing", "guard"):
                parts.append(f"![{name}]({result['name']}-{name}.png)")
    return "\n\n".join(parts) + "\n"


def say_load(result: dict[str, Any]) -> str:
    """Return who sent the requests, and to what."""
    if "affinity" in result:
        return "Requests by the client, all on one machine."
    return (
        "Served over gRPC on one machine, load by perf_analyzer 2.51 with generated click logs. Up to where users come "
        "back, requests are cold: the user KV cache is off."
    )


def make_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---:"] * len(header)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def say_seconds(value: float) -> str:
    """Return a duration at a readable precision."""
    return f"{1e3 * value:.1f} ms" if value < 0.9995 else f"{value:.2f} s"


def write_table(result: dict[str, Any]) -> str:
    """The source documents' table, measured."""
    rows = [
        [
            str(row["candidates"]),
            f"{row['claimed_speedup']:.1f}",
            f"{row['ideal_speedup']:.1f}",
            f"**{row['speedup']:.1f}**",
            say_seconds(row["shared_seconds"]),
            say_seconds(row["traditional_seconds"]) + (" *" if row["traditional_is_extrapolated"] else ""),
            f"{100 * row['gain']:.1f}%",
            f"{100 * row['throughput_drop']:.2f}%",
        ]
        for row in result["table"]
    ]
    header = ["N", "claimed ×", "ideal × (FLOPs)", "measured ×", "shared", "traditional", "gain", "throughput drop"]
    return f"## The documents' table\n\n{make_table(header, rows)}\n\n{TABLE_NOTE}"


def write_headline(result: dict[str, Any]) -> str:
    """The table for the README."""
    rows = [
        [
            str(row["candidates"]),
            f"{row['claimed_speedup']:.1f}×",
            f"{row['ideal_speedup']:.1f}×",
            f"**{row['speedup']:.1f}×**" + (" *" if row["traditional_is_extrapolated"] else ""),
            say_seconds(row["shared_seconds"]),
            say_seconds(row["traditional_seconds"]),
        ]
        for row in result["table"]
    ]
    header = [
        "candidates",
        "claimed by the source documents",
        "ideal, by FLOPs",
        "measured, served",
        "shared",
        "traditional",
    ]
    return make_table(header, rows)


def write_fusion(result: dict[str, Any]) -> str:
    """The ratio that the documents assume to be 0.15."""
    fusion = result["fusion"]
    return (
        f"C_fusion ÷ C_user = **{fusion['ratio']:.4f}** (documents: 0.15): fusing a candidate takes "
        f"{1e3 * fusion['candidate_seconds']:.3f} ms, the slope between N = {fusion['between'][0]} and N = "
        f"{fusion['between'][1]}; encoding the user takes {1e3 * fusion['user_seconds']:.1f} ms."
    )


def write_history_growth(result: dict[str, Any]) -> str:
    """Claim: the optimised scheme is almost unaffected."""
    rows = [
        [
            str(row["history"]),
            say_seconds(row["shared_seconds"]),
            say_seconds(row["traditional_seconds"]) + (" *" if row["traditional_is_extrapolated"] else ""),
            f"{row['speedup']:.1f}",
            f"{row['ideal_speedup']:.1f}",
        ]
        for row in result["history_growth"]
    ]
    first, last = result["history_growth"][0], result["history_growth"][-1]
    growth = last["shared_seconds"] / first["shared_seconds"]
    return (
        f"## As the history grows (N = {first['candidates']})\n\n"
        + make_table(["L", "shared", "traditional", "measured ×", "ideal ×"], rows)
        + f"\n\nFrom L = {first['history']} to {last['history']} the shared scheme's latency grows {growth:.0f} times: "
        'the claim "almost unaffected" does not hold for a cold request, whose history has to be encoded once.'
    )


def write_memory(result: dict[str, Any]) -> str:
    """Peak memory of one request."""
    rows = [
        [
            row["scheme"].replace("_", " "),
            str(row["candidates"]),
            f"{row['added_bytes'] / 1e6:.0f} MB" if row["added_bytes"] is not None else f"failed ({row['error']})",
            f"{row['copies_bytes'] / 1e6:.0f} MB",
        ]
        for row in result["memory"]
    ]
    return "## Memory that one request adds at its peak\n\n" + make_table(
        ["scheme", "N", "added", "(N - 1) × user KV"], rows
    )


def write_stages(result: dict[str, Any]) -> str:
    """Where the time goes."""
    stages = result["stages"]
    rows = [
        [name, f"{1e3 * value:.2f} ms", f"{100 * value / stages['total_seconds']:.1f}%"]
        for name, value in stages["stages_seconds"].items()
    ]
    return (
        f"## Where a cold request's time goes (N = {stages['candidates']}, {stages['requests']} requests)\n\n"
        + make_table(["stage", "median", "share"], rows)
        + f"\n\nOf {1e3 * stages['total_seconds']:.1f} ms, **{100 * stages['outside_onnxruntime_share']:.0f}%** is "
        "spent outside ONNX Runtime. Its share is that of bare runs in another process, interleaved with the requests."
    )


def write_load(result: dict[str, Any]) -> str:
    """Throughput and tails."""
    load = result["load"]
    closed = [
        [str(row["concurrency"]), f"{row['throughput']:.1f}", say_seconds(row["p50"]), say_seconds(row["p99"])]
        for row in load["closed_loop"]
    ]
    opened = [
        [
            f"{row['rate']:.1f}",
            f"{100 * row['share_of_capacity']:.0f}%",
            say_seconds(row["p50"]),
            say_seconds(row["p99"]),
            str(row["requests"]),
        ]
        for row in load["open_loop"]
    ]
    return (
        f"## Under load (N = {load['candidates']}, cold)\n\n"
        + make_table(["in flight", "requests/s", "p50", "p99"], closed)
        + "\n\n"
        + make_table(["Poisson arrivals/s", "of capacity", "p50", "p99", "requests"], opened)
    )


def write_packing(result: dict[str, Any]) -> str:
    """Batch 1 against batch 8."""
    rows = [
        [
            str(row["history"]),
            str(row["candidates"]),
            say_seconds(row["one_by_one_seconds"]),
            say_seconds(row["one_batch_seconds"]),
            f"{row['speedup']:.2f}",
        ]
        for row in result["packing"]
    ]
    return "## Eight users: one by one, and in one batch\n\n" + make_table(
        ["L", "N each", "one by one", "one batch of 8", "×"], rows
    )


def write_peers(result: dict[str, Any]) -> str:
    """What people would otherwise write."""
    names = list(result["peers"][0]["peers"])
    rows = []
    for row in result["peers"]:
        cells = [str(row["candidates"])]
        for name in names:
            peer = row["peers"][name]
            cells.append(
                "failed"
                if "error" in peer
                else f"{1e3 * peer['total']:.1f} ({1e3 * peer['encode']:.1f} + {1e3 * peer['fuse']:.1f})"
            )
        rows.append(cells)
    worst = max(
        peer["score_difference"] for row in result["peers"] for peer in row["peers"].values() if "error" not in peer
    )
    errors = {
        f"{PEER_NAMES.get(name, name)} at N = {row['candidates']}: {peer['error']}"
        for row in result["peers"]
        for name, peer in row["peers"].items()
        if "error" in peer
    }
    notes = "".join(f"\n\nFailed: {error}" for error in sorted(errors))
    return (
        "## What people would otherwise write\n\nMilliseconds, encode + fuse, without a server; same weights, dtype "
        f"and requests, a process each, alternating; all scores agree to {worst:.1e}.\n\n"
        + make_table(["N", *(PEER_NAMES.get(name, name) for name in names)], rows)
        + notes
    )


def write_reuse(result: dict[str, Any]) -> str:
    """Warm against cold."""
    reuse = result["reuse"]
    times = ("cold_ranker", "warm_ranker", "cold_ranker_resident", "warm_ranker_resident", "bare_fuse")
    ratios = ("cold_resident_to_cold_ranker", "warm_resident_to_cold_ranker", "warm_resident_to_bare_fuse")
    rows = [
        [str(row["candidates"]), *(say_seconds(row[name]) for name in times), *(f"{row[name]:.2f}" for name in ratios)]
        for row in reuse["rows"]
    ]
    header = ["N", "ranker cold", "ranker warm", "resident cold", "resident warm", "bare fusion run"]
    header += ["resident cold ÷ ranker cold", "resident warm ÷ ranker cold", "resident warm ÷ bare fusion"]
    memory = ", ".join(f"`{model}` {value / 1e6:.0f} MB" for model, value in sorted(reuse["process_bytes"].items()))
    hit, miss = (1e3 * reuse["bookkeeping_seconds"][state] for state in ("hit", "miss"))
    return (
        f"## A user who comes back: warm against cold\n\n{make_table(header, rows)}\n\n"
        "Cold: a new user, whose KV is kept; warm: the same request again. Times are perf_analyzer's medians, ratios "
        "the medians of those of neighbouring rounds; the bare run is ONNX Runtime's on the fusion graph, in another "
        f"process, without a server. The cache itself takes {hit:.3f} ms on a hit and {miss:.3f} ms on a miss that "
        "evicts another user (key, look-up, room; medians of calls without any encoding). Memory of each process "
        f"before its first request: {memory}."
    )


def write_reuse_headline(result: dict[str, Any]) -> str:
    """The table for the README."""
    rows = [
        [
            str(row["candidates"]),
            say_seconds(row["cold_ranker"]),
            say_seconds(row["warm_ranker"]),
            say_seconds(row["cold_ranker_resident"]),
            f"**{say_seconds(row['warm_ranker_resident'])}**",
        ]
        for row in result["reuse"]["rows"]
    ]
    header = [
        "candidates",
        "`ranker`, new user",
        "`ranker`, kept",
        "`ranker_resident`, new user",
        "`ranker_resident`, kept",
    ]
    return make_table(header, rows)


def write_trace(result: dict[str, Any]) -> str:
    """Returning users, several budgets."""
    trace = result["trace"]
    rows = [
        [
            row["way"],
            f"{row['budget_bytes'] / 1e6:.0f} MB ({row['users']} users)" if row["users"] else "–",
            f"{100 * row['hit_rate']:.1f}%",
            f"{100 * row['expected_hit_rate']:.1f}%",
            say_seconds(row["p50"]),
            say_seconds(row["p99"]),
            f"{row['throughput']:.1f}",
        ]
        for row in trace["rows"]
    ]
    traffic = trace["traffic"]
    header = ["served by", "cache", "hits", "hits of an ideal LRU", "p50", "p99", "requests/s"]
    return (
        f"## Returning users\n\n{make_table(header, rows)}\n\n"
        f"{trace['visits']} visits, {trace['in_flight']} in flight, sent by kvcast's own client to one server a row, "
        f"in turn: {traffic['users']} users by Zipf's law (exponent {traffic['exponent']}); with probability "
        f"{traffic['return_probability']} the next request is another page of one of the last {traffic['recent']} "
        f"visitors, else somebody new or with {traffic['growth']:.0f} events more than at the last visit (mean). L is "
        f"{traffic['shortest']} to {traffic['history']}, N = {traffic['candidates']}. All rows gave the same scores "
        "to 1e-5."
    )


def write_endurance(result: dict[str, Any]) -> str:
    """Memory through minutes of changing users."""
    endurance = result["endurance"]
    samples = endurance["samples"]
    rows = [
        [
            f"`{keeper}`",
            *(
                f"{value / 1e6:.0f} MB"
                for value in (
                    endurance["start_bytes"][keeper],
                    endurance["budget_bytes"],
                    max(sample["cache_bytes"][keeper] for sample in samples),
                    max(sample["process_bytes"][keeper] for sample in samples),
                    beyond,
                )
            ),
        ]
        for keeper, beyond in endurance["beyond_budget_bytes"].items()
    ]
    header = ["process", "at the start", "budget", "cache, at most", "process, at most", "beyond start + budget"]
    return (
        f"## Memory through {endurance['seconds'] / 60:.0f} minutes of changing users\n\n{make_table(header, rows)}\n\n"
        f"{endurance['requests']} requests with histories of 1 to {endurance['longest_history']} events, half to each "
        "model. What is beyond is ONNX Runtime's memory for its largest runs; the cache is one region that never grows."
    )


def write_guard(result: dict[str, Any]) -> str:
    """What the guard adds."""
    guard = result["guard"]
    rows = [
        [
            str(row["candidates"]),
            say_seconds(row["direct"]),
            say_seconds(row["guarded"]),
            f"{1e3 * row['added']:+.2f} ms",
        ]
        for row in guard["rows"]
    ]
    header = ["candidates", "Triton's own port", "through the guard", "the guard adds"]
    return (
        f"## What the guard costs\n\n{make_table(header, rows)}\n\n`ranker_resident`, users who are kept "
        f"(L = {guard['history']}), one request at a time over gRPC, in turn; what is added is the median of the "
        "rounds' differences."
    )


def write_soak(result: dict[str, Any]) -> str:
    """Slopes through half an hour of mixed load."""
    soak = result["soak"]
    first, last = soak["samples"][0], soak["samples"][-1]
    rows = []
    for name, use in last["processes"].items():
        slope, before = soak["slopes_an_hour"][name], first["processes"][name]
        rows.append(
            [
                f"`{name}`",
                f"{before['memory_bytes'] / 1e6:.0f} → {use['memory_bytes'] / 1e6:.0f} MB",
                f"{slope['memory_bytes'] / 1e6:+.1f} MB",
                f"{before['files']} → {use['files']}",
                f"{slope['files']:+.1f}",
                f"{before['threads']} → {use['threads']}",
                f"{slope['threads']:+.1f}",
            ]
        )
    shared = soak["slopes_an_hour"]["shared memory"]["memory_bytes"]
    held = f"{first['shared_memory_bytes'] / 1e6:.0f} → {last['shared_memory_bytes'] / 1e6:.0f} MB"
    rows.append(["`/dev/shm`", held, f"{shared / 1e6:+.1f} MB", "", "", "", ""])
    header = ["", "memory", "an hour", "files", "an hour", "threads", "an hour"]
    outcomes = ", ".join(
        f"{count} {what}" for what, count in sorted(soak["outcomes"].items(), key=lambda each: -each[1])
    )
    return (
        f"## {soak['seconds'] / 60:.0f} minutes of mixed load\n\n{make_table(header, rows)}\n\n"
        "Both models over both protocols through the guard, users who return and who do not, "
        f"histories of all lengths. Requests: {outcomes}. Slopes are those of the last two thirds, by least squares."
    )


def write_affinity(result: dict[str, Any]) -> str:
    """Who is found again, and who moves when a server is lost."""
    affinity = result["affinity"]
    rows = [
        [
            row["policy"],
            row["protocol"],
            say_share(row["hit_rate"]),
            f"{row['busiest_to_mean']:.2f}×",
            f"{row['outcomes']['right']} of {row['visits']}",
        ]
        for row in affinity["policies"]
    ]
    header = ["balanced by", "over", "found their user", "busiest ÷ mean", "right"]
    return (
        "## Users behind a proxy\n\n"
        f"{affinity['servers']} tritonservers behind haproxy with the shipped configuration (*affinity*), each with "
        f"room for {affinity['kept_users']} of {affinity['visitors']}, {affinity['in_flight']} requests in "
        "flight.\n\n"
        f"{make_table(header, rows)}\n\n{write_loss(affinity['lost'])}"
    )


def write_loss(lost: dict[str, Any]) -> str:
    """What became of users and requests when one server was killed under load and started again."""
    killed, added = lost["killed"], lost["added"]
    sent = sum(sum(load["outcomes"].values()) for load in lost["load"].values())
    right = sum(load["outcomes"]["right"] for load in lost["load"].values())
    slowest = max(load["slowest_seconds"] for load in lost["load"].values())
    return (
        f"One of them was killed (−9) under load and started again. It had {say_share(killed['share_of_server'])} of "
        f"{killed['users']} users; of these {say_share(killed['moved_of_server'])} moved, of the others "
        f"{say_share(killed['moved_of_others'])}. When it was back, {say_share(added['share_of_server'])} of all moved "
        f"to it, {say_share(added['moved_of_others'])} of the others between themselves, and "
        f"{say_share(lost['came_back'])} of all were where they had been before. Meanwhile {right} of {sent} requests "
        f"of retrying clients were answered right, the slowest in {say_seconds(slowest)}."
    )


def say_share(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f}%"
