"""`kvcast train study`: what the mask costs on logs of yours, or on generated ones whose best ranking is known."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kvcast.protocol.config import list_configs, load_config
from kvcast.train.errors import TrainingError
from kvcast.train.plots import draw_study
from kvcast.train.speed import describe_machine
from kvcast.train.study import BOUND, POPULARITY, SERVED, Plan, run_study
from kvcast.train.trainer import EVALUATIONS, Settings, describe_seconds

NAMES = {
    POPULARITY: "popularity of the item alone",
    "no_history": "no history",
    "target_blind": "**target-blind, as served**",
    "undirected": "undirected",
    SERVED: "trained undirected, served target-blind",
    BOUND: "the true probability",
}


def add_study_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `study` to the commands of `kvcast train`."""
    default = Settings()
    parser = commands.add_parser(
        "study",
        help="train with each mask and compare",
        description="Train the same network with each mask on the same requests for as many steps, each run on one "
        "thread, and compare AUC and NDCG@10 on the last requests with popularity, and on generated logs "
        "(kvcast clicklog --with-truth) with the best possible ranking. Writes study.json, study.md and study.png. A "
        "run that is complete is not repeated, so the command can be given again after an interruption.",
    )
    parser.add_argument("--config", required=True, help=f"{', '.join(list_configs())}, or the path of a TOML file")
    parser.add_argument("--log", type=Path, required=True, nargs="+", metavar="FILE", help="one or more click logs")
    parser.add_argument("--with-truth", action="store_true", help="the logs have the true probabilities with them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs and results are written")
    parser.add_argument("--seeds", type=int, default=1, help="runs a log; intervals need two runs in all (%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of every run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="requests of a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="(%(default)s)")
    parser.add_argument("--validation", type=float, default=0.02, metavar="SHARE", help="of requests (%(default)s)")
    parser.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="of requests, the last (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")


def run_study_command(arguments: argparse.Namespace) -> int:
    """Run the study and write what came out; return the exit status.

    Raises:
        KvcastError: a log or an option cannot be used.
    """
    if min(arguments.seeds, arguments.jobs) < 1:
        raise TrainingError(f"--seeds, --jobs: expected at least 1, got {arguments.seeds} and {arguments.jobs}")
    stems = [log.stem for log in arguments.log]
    if len(set(stems)) < len(stems):
        raise TrainingError(f"--log: expected files of different names, got {', '.join(stems)}")
    if not arguments.out.parent.is_dir():
        raise TrainingError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist")
    plan = make_plan(arguments)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{describe_seconds(time.monotonic() - started)}, {line}", file=sys.stderr, flush=True)

    found = run_study(plan, arguments.jobs, say)
    torch.set_num_threads(1)  # as in every run
    regime = {
        "command": describe_command(arguments),
        "config": plan.config.name,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "machine": describe_machine(torch.device("cpu")),
    }
    result = regime | found
    (arguments.out / "study.json").write_text(json.dumps(result, indent=1) + "\n")
    table = write_table(result)
    (arguments.out / "study.md").write_text(table)
    draw_study(result, {way: name.strip("*") for way, name in NAMES.items()}, arguments.out / "study.png")
    print(table, end="")
    return 0


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Return what the options say. Every run takes all its steps: that is the budget."""
    settings = Settings(
        epochs=arguments.steps,  # more than the steps take
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        patience=EVALUATIONS + 1,
    )
    return Plan(
        config=load_config(arguments.config),
        logs=tuple(arguments.log),
        seeds=arguments.seeds,
        settings=settings,
        validation=arguments.validation,
        test=arguments.test,
        truth=arguments.with_truth,
        folder=arguments.out,
    )


def describe_command(arguments: argparse.Namespace) -> str:
    """Return the command that does the same again, paths by their names."""
    options = ("seeds", "steps", "batch_size", "learning_rate", "validation", "test", "jobs")
    parts = [f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in options]
    logs = " ".join(log.name for log in arguments.log)
    truth = ["--with-truth"] if arguments.with_truth else []
    head = [
        "kvcast train study",
        f"--config {arguments.config}",
        f"--log {logs}",
        *truth,
        f"--out {arguments.out.name}",
    ]
    return " ".join([*head, *parts])


def write_table(result: dict[str, Any]) -> str:
    """Return the result as Markdown: a row a way, then the differences within a run."""
    lines = ["| ranked by | AUC | NDCG@10 |", "|---|---|---|"]
    for way, metrics in result["ways"].items():
        lines.append(f"| {NAMES[way]} | {write_interval(metrics['auc'])} | {write_interval(metrics['ndcg_at_10'])} |")
    lines += ["", "| difference within a run | AUC | NDCG@10 |", "|---|---|---|"]
    for row in result["differences"]:
        name = f"{NAMES[row['of']].strip('*')}, less {NAMES[row['over']].strip('*')}"
        lines.append(f"| {name} | {write_interval(row['auc'], '+')} | {write_interval(row['ndcg_at_10'], '+')} |")
    return "\n".join(lines) + "\n"


def write_interval(found: dict[str, Any], sign: str = "") -> str:
    """Return `0.8123 ± 0.0012`."""
    mean, high = found["mean"], found["high"]
    return f"{mean:{sign}.4f}" + ("" if high is None else f" ± {high - mean:.4f}")
