"""Train the same network with each mask on the same requests for as many steps, each run on one thread.

Compares AUC and NDCG@10 on the last requests with popularity, and on generated logs (kvcast clicklog --with-truth) with
the best possible ranking. Means and 95% intervals are over runs, one a log and seed; differences are those within
a run, which vary far less. Writes study.json, study.md and study.png. A run that is complete is not repeated, so the
command can be given again after an interruption.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from scipy import stats

from kvcast.protocol.config import ModelConfig, list_configs, load_config
from kvcast.train.batches import SCHEMES, Scheme, score_requests
from kvcast.train.errors import TrainingError
from kvcast.train.log import read_log
from kvcast.train.metrics import Metrics, measure_ranking, score_by_popularity
from kvcast.train.plots import draw_study
from kvcast.train.requests import Requests
from kvcast.train.speed import describe_command, describe_machine
from kvcast.train.splits import Split, split_by_shares
from kvcast.train.trainer import (
    EVALUATIONS,
    Controls,
    Parts,
    RunFiles,
    Settings,
    Trainer,
    describe_seconds,
    make_trainable,
)

Floats = npt.NDArray[np.float64]
# Ways to rank. `popularity` learns an item's own rate; `undirected_served` are the weights of `undirected` under the
# mask that is served; `bound` ranks by the probabilities that the labels were drawn with.
POPULARITY, SERVED, BOUND = "popularity", "undirected_served", "bound"
WAYS = {
    POPULARITY: "popularity of the item alone",
    "no_history": "no history",
    "target_blind": "**target-blind, as served**",
    "undirected": "undirected",
    SERVED: "trained undirected, served target-blind",
    BOUND: "the true probability",
}
METRICS = ("auc", "ndcg_at_10", "log_loss")
# The value of the history, the cost of the mask, the cost of serving with another mask than in training.
DIFFERENCES = (("target_blind", "no_history"), ("target_blind", "undirected"), (SERVED, "undirected"))
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Plan:
    """A study: the logs, the seeds for each, and how to train.

    settings: of every run, but for mask and seed. validation, test: shares of the requests, by time. truth: the logs
    have the true probabilities with them. folder: where runs are kept; one that is complete is not repeated.
    """

    config: ModelConfig
    logs: tuple[Path, ...]
    seeds: int
    settings: Settings
    validation: float
    test: float
    truth: bool
    folder: Path


@dataclass(frozen=True)
class Job:
    """One training run of a study."""

    log: Path
    seed: int
    scheme: Scheme

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.log.stem}-{self.seed}-{self.scheme}"


def run_study(plan: Plan, processes: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Train every way on every log with every seed, each run on one thread; return the result.

    Args:
        plan: the study.
        processes: runs at a time.
        say: receives lines of progress.

    Raises:
        KvcastError: a log or the settings cannot be used.
    """
    jobs = [Job(log, seed, scheme) for scheme in SCHEMES for log in plan.logs for seed in range(plan.seeds)]
    jobs.sort(key=lambda job: job.scheme != "undirected")  # the longest first, so that none is left alone at the end
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting: dict[Future[list[dict[str, Any]]], Job] = {pool.submit(run_job, plan, job): job for job in jobs}
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                found = done.result()
                rows += found
                results = ", ".join(describe_row(row) for row in found)
                say(f"run {number} of {len(jobs)} ({waiting[done].name}): {results}")
        except BrokenProcessPool:
            raise TrainingError(
                "the process of a run was ended from outside, perhaps for its memory: give the command again, with "
                "fewer --jobs; what is complete is kept"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for log in plan.logs:
        rows += judge_untrained(plan, log)
    order = {way: place for place, way in enumerate(WAYS)}
    rows.sort(key=lambda row: (order[row["way"]], row["log"], row["seed"]))
    return {"runs": rows, **summarise(rows)}


def run_job(plan: Plan, job: Job) -> list[dict[str, Any]]:
    """Train once; return a row of test metrics, and one more for undirected weights that are served."""
    torch.set_num_threads(1)
    split, _ = read_split(plan, job.log)
    settings = replace(plan.settings, seed=job.seed, scheme=job.scheme)
    folder = plan.folder / job.name
    folder.mkdir(parents=True, exist_ok=True)
    files = RunFiles(folder / "weights.safetensors")
    say = partial(write_line, folder / "progress.txt")
    device = torch.device("cpu")
    parts = Parts(split.training, split.validation, split.test)
    trainer = Trainer(plan.config, settings, parts, files, device, Controls(say))
    trainer.resume()
    trainer.run()
    evaluations = [row for row in trainer.progress.rows if "validation" in row]
    last = trainer.progress.rows[-1]
    row = {
        "way": job.scheme,
        "log": job.log.name,
        "seed": job.seed,
        **last["best_test"],
        "best_step": last["step"],
        "steps": last["steps_taken"],
        "training_candidates_per_second": statistics.median(each["examples_per_second"] for each in evaluations),
        "validation_auc": [[each["step"], round(each["validation"]["auc"], 5)] for each in evaluations],
    }
    if job.scheme != "undirected":
        return [row]
    network = make_trainable(plan.config, job.seed)
    network.load_state_dict(load_file(files.weights))
    scores = score_requests(network, split.test, "target_blind", settings.batch_size, device)
    served = measure_ranking([request.labels for request in split.test], scores)
    return [row, make_row(SERVED, job.log, job.seed, served)]


def judge_untrained(plan: Plan, log: Path) -> list[dict[str, Any]]:
    """Return the rows of the ways that no seed decides."""
    split, log_odds = read_split(plan, log)
    labels = [request.labels for request in split.test]
    popularity = measure_ranking(labels, score_by_popularity(split.training, split.test))
    rows = [make_row(POPULARITY, log, None, popularity)]
    if log_odds is not None:
        best = measure_ranking(labels, [log_odds[split.test.rows(index)] for index in range(len(split.test))])
        rows.append(make_row(BOUND, log, None, best))
    return rows


def read_split(plan: Plan, path: Path) -> tuple[Split, Floats | None]:
    """Return the parts of a log, and the true log-odds of its rows, if it has them."""
    config = plan.config
    log = read_log(path, config.schema, truth=plan.truth)
    requests = Requests(log, config.schema, config.limits, config.time_field)
    split = split_by_shares(requests, plan.validation, plan.test)
    return split, None if log.truth is None else np.log(log.truth / (1 - log.truth))


def make_row(way: str, log: Path, seed: int | None, metrics: Metrics) -> dict[str, Any]:
    """Return one row of the result."""
    return {"way": way, "log": log.name, "seed": seed, **metrics.to_json()}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean and interval of every metric of every way, and of the differences between two ways of a run."""
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    return {
        "ways": {way: {metric: find_interval(pick(rows, way, metric).values()) for metric in METRICS} for way in ways},
        "differences": [
            {
                "of": one,
                "over": other,
                **{
                    metric: find_interval(
                        value - pick(rows, other, metric)[key] for key, value in pick(rows, one, metric).items()
                    )
                    for metric in METRICS
                },
            }
            for one, other in DIFFERENCES
        ],
    }


def pick(rows: Sequence[dict[str, Any]], way: str, metric: str) -> dict[tuple[str, int], float]:
    """Return one metric of one way, by log and seed."""
    return {(row["log"], row["seed"]): row[metric] for row in rows if row["way"] == way}


def find_interval(values: Iterable[float]) -> dict[str, float | None]:
    """Return the mean and the 95% interval of a mean (Student's t); no interval from fewer than two values."""
    found = list(values)
    mean = statistics.fmean(found)
    if len(found) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)) * statistics.stdev(found) / len(found) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def describe_row(row: dict[str, Any]) -> str:
    """Return one result in words."""
    return f"{row['way']} AUC {row['auc']:.4f}, NDCG@10 {row['ndcg_at_10']:.4f}"


def write_line(path: Path, line: str) -> None:
    """Add a line to a file."""
    with path.open("a") as file:
        file.write(line + "\n")


# ---- the command ----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `study`."""
    parser.add_argument("--config", required=True, help=f"{', '.join(list_configs())}, or the path of a TOML file")
    parser.add_argument("--log", type=Path, required=True, nargs="+", metavar="FILE", help="one or more click logs")
    parser.add_argument("--with-truth", action="store_true", help="the logs have the true probabilities with them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs and results are written")
    parser.add_argument("--seeds", type=int, default=1, help="runs a log; intervals need two runs in all (%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of every run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size, help="requests of a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate, help="at its peak (%(default)s)")
    parser.add_argument("--validation", type=float, default=0.02, metavar="SHARE", help="of requests (%(default)s)")
    parser.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="of requests, the last (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
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
    settings = Settings(
        epochs=arguments.steps,  # more than the steps take: every run takes all its steps
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        patience=EVALUATIONS + 1,
    )
    plan = Plan(
        load_config(arguments.config),
        tuple(arguments.log),
        arguments.seeds,
        settings,
        arguments.validation,
        arguments.test,
        arguments.with_truth,
        arguments.out,
    )
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
    draw_study(result, {way: name.strip("*") for way, name in WAYS.items()}, arguments.out / "study.png")
    print(table, end="")
    return 0


def write_table(result: dict[str, Any]) -> str:
    """Return the result as Markdown: a row a way, then the differences within a run."""
    lines = ["| ranked by | AUC | NDCG@10 |", "|---|---|---|"]
    for way, metrics in result["ways"].items():
        lines.append(f"| {WAYS[way]} | {write_interval(metrics['auc'])} | {write_interval(metrics['ndcg_at_10'])} |")
    lines += ["", "| difference within a run | AUC | NDCG@10 |", "|---|---|---|"]
    for row in result["differences"]:
        name = f"{WAYS[row['of']].strip('*')}, less {WAYS[row['over']].strip('*')}"
        lines.append(f"| {name} | {write_interval(row['auc'], '+')} | {write_interval(row['ndcg_at_10'], '+')} |")
    return "\n".join(lines) + "\n"


def write_interval(found: dict[str, Any], sign: str = "") -> str:
    """Return `0.8123 ± 0.0012`."""
    mean, high = found["mean"], found["high"]
    return f"{mean:{sign}.4f}" + ("" if high is None else f" ± {high - mean:.4f}")
