"""`python -m perf run`: measure side by side, with report and plots; `python -m perf model`: only compute FLOPs."""

import argparse
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kvcast.protocol.config import load_config
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.manifest import read_manifest
from kvcast.protocol.tensors import RANKER_RESIDENT
from kvcast.server import ServeConfig, ServerError
from kvcast.server.repository import ensure_exported, read_config_name
from kvcast.serving.artefact import SessionOptions
from perf import affinity, cost_model, guard_cost, reuse, soak
from perf.analyzer import PerfError, find_analyzer
from perf.baselines.race import Field
from perf.experiments import COLD, measure_fusion_ratio, open_bench
from perf.harness import Harness, Plan
from perf.plots import draw_all, regime
from perf.processes import describe_machine
from perf.report import write_report

# Each starts servers of its own.
SERVED: Mapping[str, Callable[[Harness], Any]] = {
    "reuse": reuse.run_reuse,
    "trace": reuse.run_trace,
    "endurance": soak.run_endurance,
    "guard": guard_cost.run_guard,
    "soak": soak.run_soak,
    "affinity": affinity.run_affinity,
}
EXPERIMENTS = (*COLD, *SERVED)
REGIME = """\
regime: one machine serves and loads; requests are generated, never perf_analyzer's own random data; what is compared
alternates within this run; figures are medians. Full recomputation is `ranker_full`: the same weights and mask,
every candidate a full sequence. Requests are cold (the cache is off) except in reuse, trace, endurance and soak."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, report, plot", description="Measure on a running tritonserver.")
    run.add_argument("--config", default="bench")
    run.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    run.add_argument("--results", type=Path, default=Path("perf/results"), metavar="DIR", help="where results go")
    run.add_argument("--name", help="name of the result files (the configuration's, with -quick for --quick)")
    run.add_argument("--quick", action="store_true", help="a smaller run: 4 minutes for bench on 2 cores")
    run.add_argument(
        "--experiments",
        help=f"({','.join(EXPERIMENTS)}; not if quick: endurance, ten minutes; only if named: soak, 30, and affinity, "
        "which needs haproxy)",
    )
    run.add_argument("--counts", help="candidates in the table, e.g. 1,5,10 (1,5,10,50,100,1000)")
    run.add_argument(
        "--full-limit",
        "--traditional-limit",
        dest="traditional_limit",
        type=float,
        metavar="SECONDS",
        help="measure full recomputation only if a request takes less than this, else extrapolate (60; 5 if quick)",
    )
    run.add_argument(
        "--endurance", type=float, default=soak.ENDURANCE_SECONDS, metavar="SECONDS", help="of the trace (%(default)s)"
    )
    run.add_argument(
        "--soak", type=float, default=soak.SOAK_SECONDS, metavar="SECONDS", help="of mixed load (%(default)s)"
    )
    run.add_argument("--visits", type=int, default=2000, help="of each policy in affinity (%(default)s)")
    run.add_argument("--seed", type=int, default=1, help="of the visitors in affinity (%(default)s)")
    run.add_argument(
        "--trace", type=Path, metavar="FILE.csv", help="visitors of affinity instead: columns seconds, user (in order)"
    )
    run.add_argument("--http-port", type=int, default=8000, metavar="PORT")
    run.add_argument("--grpc-port", type=int, default=8001, metavar="PORT")
    run.add_argument("--metrics-port", type=int, default=8002, metavar="PORT")
    run.add_argument("--rounds", type=int, help="times that what is compared alternates (5; 2 if quick)")
    run.add_argument("--requests", type=int, help="requests of one measurement (30; 8 if quick)")
    report = commands.add_parser("report", help="write the report and the plots of a result file again")
    report.add_argument("result", type=Path, metavar="RESULT.json")
    model = commands.add_parser("model", help="print FLOPs, bytes and ideal speedups; runs nothing")
    model.add_argument("--config", default="bench")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        if arguments.command == "model":
            print(cost_model.describe(load_config(arguments.config)))
        elif arguments.command == "report":
            write_files(json.loads(arguments.result.read_text()), arguments.result.parent)
        else:
            run(arguments)
    except (KvcastError, ServerError, OSError) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Run the chosen experiments, and write result, report and plots."""
    find_analyzer()
    signal.signal(signal.SIGTERM, _leave)  # the servers that it started end with it
    config = load_config(arguments.config)
    started, cores = time.monotonic(), len(os.sched_getaffinity(0))
    chosen = choose_experiments(arguments)
    settings = ServeConfig(
        repository=arguments.repository,
        models=["ranker", "ranker_full"],
        config=read_config_name(arguments.config),
        http_port=arguments.http_port,
        grpc_port=arguments.grpc_port,
        metrics_port=arguments.metrics_port,
        is_guarded=False,  # the gateway's overhead is a measurement of its own
    )
    ensure_exported(arguments.repository, [*settings.models, RANKER_RESIDENT.name], arguments.config)
    manifest = read_manifest(arguments.repository / RANKER_RESIDENT.name / "1")
    result: dict[str, Any] = {
        "name": arguments.name or config.name + ("-quick" if arguments.quick else ""),
        "quick": arguments.quick,
        "command": describe_command(arguments),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(SessionOptions().count_threads(manifest)),
        "config": {
            "name": config.name,
            "history": config.workload.history,
            "width": config.network.width,
            "layers": config.network.layers,
            "heads": config.network.heads,
            "candidate_tokens": len(config.schema.candidate_fields),
        },
    }
    print(f"{regime(result)}\n\n{REGIME}\n", flush=True)
    field = Field(arguments.config, arguments.repository, cores, seed=0)
    notes = Notes(result, arguments.results, len(chosen))
    measure(Harness(settings, config, make_plan(arguments), field, notes.say), chosen, notes)
    result["seconds"] = time.monotonic() - started
    write_files(result, arguments.results)


def measure(harness: Harness, chosen: list[str], notes: "Notes") -> None:
    """Run experiments one after the other, so that none disturbs another: first those that share a server."""
    cold = [name for name in chosen if name in COLD]
    if cold:
        with open_bench(harness) as bench:
            for name in cold:
                notes.take(name, partial(COLD[name], bench))
            if "table" in cold:
                notes.result["fusion"] = measure_fusion_ratio(bench)
    for name in chosen:
        if name in SERVED:
            notes.take(name, partial(SERVED[name], harness))


def describe_command(arguments: argparse.Namespace) -> str:
    """Return the command that measures the same again; where it served and wrote is left out."""
    left_out = {"command", "quick", "name", "repository", "results", "http_port", "grpc_port", "metrics_port"}
    default = vars(make_parser().parse_args(["run"]))
    parts = ["python -m perf run"] + (["--quick"] if arguments.quick else [])
    for name, value in vars(arguments).items():
        if name not in left_out and (name == "config" or value != default[name]):
            parts.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(parts)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan that the options describe."""
    limit = arguments.traditional_limit or (5 if arguments.quick else 60)
    rounds, requests = (2, 8) if arguments.quick else (5, 30)
    return Plan(
        rounds=arguments.rounds or rounds,
        requests=arguments.requests or requests,
        traditional_limit=limit,
        quick=arguments.quick,
        counts=[int(count) for count in (arguments.counts or "").split(",") if count],
        endurance=arguments.endurance,
        soak=arguments.soak,
        visits=arguments.visits,
        seed=arguments.seed,
        trace=arguments.trace,
    )


class Notes:
    """Adds experiments to the result: each is announced, timed, and saved at once."""

    def __init__(self, result: dict[str, Any], folder: Path, count: int) -> None:
        self.result = result
        self._folder, self._count, self._place = folder, count, 0

    def say(self, line: str) -> None:
        """Print a line at once."""
        print(line, flush=True)

    def take(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure one thing."""
        self._place += 1
        label, begun = f"[{self._place}/{self._count}] {name.replace('_', ' ')}", time.monotonic()
        self.say(f"{label} …")
        self.result[name] = measure()
        self.say(f"{label}: {time.monotonic() - begun:.0f} s")
        save_raw(self.result, self._folder)


def choose_experiments(arguments: argparse.Namespace) -> list[str]:
    """Return the experiments to run.

    Raises:
        PerfError: one is not known.
    """
    named_only = {"soak", "affinity"} | ({"endurance"} if arguments.quick else set())
    default = [name for name in EXPERIMENTS if name not in named_only]
    chosen = arguments.experiments.split(",") if arguments.experiments else default
    unknown = set(chosen) - set(EXPERIMENTS)
    if unknown:
        raise PerfError(f"experiments: expected some of {', '.join(EXPERIMENTS)}, got {', '.join(sorted(unknown))}")
    return list(dict.fromkeys(chosen))


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 the signature of a signal handler
    raise KeyboardInterrupt


def save_raw(result: dict[str, Any], folder: Path) -> None:
    """Write the raw result; records by their fields."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['name']}.json").write_text(json.dumps(result, indent=1, default=vars) + "\n")


def write_files(result: dict[str, Any], folder: Path) -> None:
    """Write the raw result, the report and the plots."""
    save_raw(result, folder)
    result = json.loads((folder / f"{result['name']}.json").read_text())
    (folder / f"{result['name']}.md").write_text(write_report(result))
    plots = draw_all(result, folder)
    print(f"\nwritten: {folder}/{result['name']}.json, .md and {len(plots)} plots")
    for row in result.get("table", []):
        print(json.dumps({key: row[key] for key in ("candidates", "speedup", "ideal_speedup", "claimed_speedup")}))


if __name__ == "__main__":
    sys.exit(main())
