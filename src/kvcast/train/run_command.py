"""Train a network on a click log: candidates grouped by request, each history encoded once by the calls that serve.

Writes the weights that ranked the validation part best, and beside them metrics (a JSON document a line), their plot,
and a checkpoint that --resume goes on from.
"""

import argparse
import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

from kvcast.protocol.config import ModelConfig, list_configs, load_config
from kvcast.train.batches import SCHEMES
from kvcast.train.log import read_log
from kvcast.train.objective import LOSSES
from kvcast.train.plots import draw_run
from kvcast.train.requests import Requests
from kvcast.train.splits import split_by_shares
from kvcast.train.trainer import Controls, Interrupted, Parts, RunFiles, Settings, Trainer, choose_device

# Settings that are plain numbers, with their help.
SETTINGS = {
    "seed": "of the weights and of the order of requests",
    "epochs": "passes over the training part",
    "batch_size": "requests of a step",
    "learning_rate": "at its peak",
    "weight_decay": "of AdamW",
    "warmup": "of the learning rate, a share of the steps",
    "gradient_limit": "of the norm",
    "patience": "evaluations without a better AUC after which it ends",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    parser.add_argument("--config", required=True, help=f"{', '.join(list_configs())}, or the path of a TOML file")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE", help="a click log, Parquet or CSV")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="the weights to write")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside --out, if there is one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU; one gives the same weights bit for bit, every time")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="end after so long; the learning rate falls with the time then"
    )
    parser.add_argument(
        "--bad-rows", choices=("stop", "skip"), default="stop", help="bad rows of the log (%(default)s)"
    )
    parser.add_argument("--validation", type=float, default=0.1, metavar="SHARE", help="of requests (%(default)s)")
    parser.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="of requests, the last (%(default)s)")
    parser.add_argument(
        "--mask",
        choices=[scheme.replace("_", "-") for scheme in SCHEMES],
        default=Settings.scheme.replace("_", "-"),
        help="target-blind is what is served; undirected costs a row a candidate; no-history sees the candidates alone",
    )
    parser.add_argument("--loss", choices=LOSSES, default=Settings.loss, help="of labels, or of lists (%(default)s)")
    parser.add_argument("--steps", type=int, help="at most (as many as the epochs take)")
    parser.add_argument(
        "--evaluate-every", type=int, default=Settings.evaluate_every, metavar="STEPS", help="(20 times in a run)"
    )
    for name, text in SETTINGS.items():
        default = getattr(Settings, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"{text} (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Train; return the exit status."""
    config, device = load_config(arguments.config), choose_device(arguments.device)
    files, settings = RunFiles(arguments.out), read_settings(arguments)
    parts = read_parts(arguments, config)
    with catch_signals() as should_stop:
        limit = 60 * arguments.minutes if arguments.minutes else math.inf
        trainer = Trainer(config, settings, parts, files, device, Controls(say, should_stop, limit))
        if arguments.resume:
            is_resumed = trainer.resume()
            say(f"going on from step {trainer.progress.step}" if is_resumed else f"no {files.checkpoint}: a new run")
        say(describe_start(trainer, device))
        try:
            trainer.run()
        except Interrupted:
            say(f"interrupted after step {trainer.progress.step}; --resume goes on from {files.checkpoint}")
            return 128 + signal.SIGINT
        finally:
            if any("validation" in row for row in trainer.progress.rows):
                draw_run(trainer.progress.rows, *title_plot(config, settings, parts, device), files.plot)
    say(f"weights: {files.weights}; metrics: {files.metrics}, {files.plot}")
    return 0


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Return what the options say."""
    names = {field.name for field in dataclasses.fields(Settings)} - {"scheme"}
    chosen = {name: getattr(arguments, name) for name in names}
    return Settings(scheme=arguments.mask.replace("-", "_"), **chosen)


def read_parts(arguments: argparse.Namespace, config: ModelConfig) -> Parts:
    """Read the log, and split it by time."""
    say(f"reading {arguments.log} …")
    log = read_log(arguments.log, config.schema, bad_rows=arguments.bad_rows)
    if log.bad.rows:
        say(f"{log.bad.rows} bad rows skipped:\n{log.bad.describe()}")
    requests = Requests(log, config.schema, config.limits, config.time_field)
    split = split_by_shares(requests, arguments.validation, arguments.test)
    say(split.describe())
    return Parts(split.training, split.validation, split.test)


def describe_start(trainer: Trainer, device: torch.device) -> str:
    """Return one line: what is trained, where."""
    weights = sum(parameter.numel() for parameter in trainer.network.parameters())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{weights / 1e6:.2f} M weights, at most {trainer.steps} steps, {where}"


def title_plot(config: ModelConfig, settings: Settings, parts: Parts, device: torch.device) -> tuple[str, str]:
    """Return the title of the plot, and its second line."""
    mask = settings.scheme.replace("_", "-")
    regime = (
        f"{len(parts.training)} requests to learn from, {len(parts.validation)} to choose by, "
        f"{settings.batch_size} a step, learning rate {settings.learning_rate:g}, seed {settings.seed}, {device.type}"
    )
    return f"{config.name}, {mask}, {settings.loss} loss", regime


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Give a function that returns true after the first Ctrl-C or SIGTERM; the second has its usual effect."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
