"""`kvcast train`: train a network on a click log.

`train study` compares masks, `train speed` times a step, `train log` checks and makes logs.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

from kvcast.protocol.config import ModelConfig, list_configs, load_config
from kvcast.protocol.errors import KvcastError
from kvcast.train.batches import SCHEMES
from kvcast.train.log import read_log
from kvcast.train.log_command import add_log_parser, run_log
from kvcast.train.objective import LOSSES
from kvcast.train.plots import draw_run
from kvcast.train.requests import Requests
from kvcast.train.speed import measure_speed
from kvcast.train.splits import Split, split_by_shares
from kvcast.train.study_command import add_study_parser, run_study_command
from kvcast.train.trainer import Controls, Interrupted, Parts, RunFiles, Settings, Trainer, choose_device

# `kvcast train --config …` is `kvcast train run --config …`.
COMMANDS = ("run", "speed", "log", "study")
DEFAULT_COMMAND = "run"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="kvcast train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_run_parser(commands)
    add_speed_parser(commands)
    add_log_parser(commands)
    add_study_parser(commands)
    return parser


def add_run_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the options of a training run."""
    default = Settings()
    run = commands.add_parser(
        DEFAULT_COMMAND,
        help="train (also without this word)",
        description="Train a network on a click log: candidates grouped by request, each history encoded once by the "
        "calls that serve. Writes the weights that ranked the validation part best, and beside them metrics (a JSON "
        "document a line), their plot, and a checkpoint that --resume goes on from.",
    )
    run.add_argument(
        "--config", required=True, help=f"{', '.join(list_configs())}, or the path of a TOML file (%(default)s)"
    )
    run.add_argument("--log", type=Path, required=True, metavar="FILE", help="a click log, Parquet or CSV")
    run.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors", help="the weights to write")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint beside --out, if there is one")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    run.add_argument("--threads", type=int, help="of the CPU; one gives the same weights bit for bit, every time")
    run.add_argument(
        "--minutes", type=float, metavar="M", help="end after so long; the learning rate falls with the time then"
    )
    run.add_argument(
        "--bad-rows", choices=("stop", "skip"), default="stop", help="what to do with bad rows of the log (%(default)s)"
    )
    run.add_argument(
        "--validation", type=float, default=0.1, metavar="SHARE", help="of requests, by time (%(default)s)"
    )
    run.add_argument(
        "--test", type=float, default=0.1, metavar="SHARE", help="of requests, the last ones (%(default)s)"
    )
    run.add_argument(
        "--mask",
        choices=[scheme.replace("_", "-") for scheme in SCHEMES],
        default=default.scheme.replace("_", "-"),
        help="target-blind is what is served; undirected costs a row a candidate; no-history sees the candidates alone",
    )
    run.add_argument("--loss", choices=LOSSES, default=default.loss, help="of labels, or of lists (%(default)s)")
    run.add_argument("--seed", type=int, default=default.seed, help="(%(default)s)")
    run.add_argument("--epochs", type=int, default=default.epochs, help="(%(default)s)")
    run.add_argument("--steps", type=int, help="at most (as many as the epochs take)")
    run.add_argument("--batch-size", type=int, default=default.batch_size, help="requests of a step (%(default)s)")
    run.add_argument("--learning-rate", type=float, default=default.learning_rate, help="at its peak (%(default)s)")
    run.add_argument("--weight-decay", type=float, default=default.weight_decay, help="(%(default)s)")
    run.add_argument("--warmup", type=float, default=default.warmup, help="a share of the steps (%(default)s)")
    run.add_argument("--gradient-limit", type=float, default=default.gradient_limit, help="of the norm (%(default)s)")
    run.add_argument(
        "--evaluate-every", type=int, default=default.evaluate_every, metavar="STEPS", help="(20 times in a run)"
    )
    run.add_argument(
        "--patience",
        type=int,
        default=default.patience,
        help="evaluations without a better AUC after which it ends (%(default)s)",
    )


def add_speed_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the options of the measurement."""
    speed = commands.add_parser(
        "speed",
        help="time a step against a row a candidate",
        description="Time training steps with each history encoded once against steps with a row a candidate: the same "
        "batch, the same kernels, the same loss and gradients (checked), alternating. Prints one JSON document.",
    )
    speed.add_argument("--config", default="bench")
    speed.add_argument("--candidates", metavar="N,N,…", help="of a request (the configuration's workload)")
    speed.add_argument("--history", type=int, metavar="L", help="events of a request (the configuration's workload)")
    speed.add_argument("--users", type=int, default=2, help="requests of a step (%(default)s)")
    speed.add_argument("--rounds", type=int, default=3, help="timed steps each way (%(default)s)")
    speed.add_argument(
        "--rows-at-once",
        type=int,
        default=16,
        metavar="ROWS",
        help="sequences in memory, a row a candidate (%(default)s)",
    )
    speed.add_argument("--monolith", action="store_true", help="time the monolith too, without fast attention")
    speed.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    speed.add_argument("--threads", type=int, help="of the CPU")
    speed.add_argument(
        "--cpu-time", action="store_true", help="count the process's CPU seconds: for a machine that is not idle"
    )
    speed.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in (*COMMANDS, "-h", "--help"):
        argv = [DEFAULT_COMMAND, *argv]
    arguments = make_parser().parse_args(argv)
    try:
        if getattr(arguments, "threads", None):
            torch.set_num_threads(arguments.threads)
        commands = {"run": run_training, "speed": run_speed, "log": run_log, "study": run_study_command}
        return commands[arguments.command](arguments)
    except KvcastError as error:
        print(f"kvcast train: {error}", file=sys.stderr)
        return 1


def run_training(arguments: argparse.Namespace) -> int:
    """Train; return the exit status."""
    config, device = load_config(arguments.config), choose_device(arguments.device)
    files, settings = RunFiles(arguments.out), read_settings(arguments)
    parts = read_parts(arguments, config)
    with catch_signals() as should_stop:
        limit = 60 * arguments.minutes if arguments.minutes else math.inf
        trainer = Trainer(config, settings, parts, files, device, Controls(say, should_stop, limit))
        if arguments.resume:
            went_on = trainer.resume()
            say(f"going on from step {trainer.progress.step}" if went_on else f"no {files.checkpoint}: beginning anew")
        say(describe_start(trainer, device))
        try:
            trainer.run()
        except Interrupted:
            say(f"interrupted after step {trainer.progress.step}; --resume goes on from {files.checkpoint}")
            return 128 + signal.SIGINT
        finally:
            if any("validation" in row for row in trainer.progress.rows):
                draw_run(trainer.progress.rows, *describe_run(config, settings, parts, device), files.plot)
    say(f"weights: {files.weights}; metrics: {files.metrics}, {files.plot}")
    return 0


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Return what the options say."""
    names = {field.name for field in dataclasses.fields(Settings)} - {"scheme"}
    chosen = {name: getattr(arguments, name) for name in names}
    return Settings(scheme=arguments.mask.replace("-", "_"), **chosen)


def read_parts(arguments: argparse.Namespace, config: ModelConfig) -> Parts:
    """Read the log, and cut it by time."""
    say(f"reading {arguments.log} …")
    log = read_log(arguments.log, config.schema, bad_rows=arguments.bad_rows)
    if log.bad.rows:
        say(f"{log.bad.rows} bad rows skipped:\n{log.bad.describe()}")
    split: Split = split_by_shares(Requests(log, config.schema, config.limits), arguments.validation, arguments.test)
    say(split.describe())
    return Parts(split.training, split.validation, split.test)


def describe_start(trainer: Trainer, device: torch.device) -> str:
    """Return one line: what is trained, where."""
    weights = sum(parameter.numel() for parameter in trainer.network.parameters())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{weights / 1e6:.2f} M weights, at most {trainer.steps} steps, {where}"


def describe_run(config: ModelConfig, settings: Settings, parts: Parts, device: torch.device) -> tuple[str, str]:
    """Return the title of the plot, and its second line."""
    mask = settings.scheme.replace("_", "-")
    regime = (
        f"{len(parts.training)} requests to learn from, {len(parts.validation)} to choose by, "
        f"{settings.batch_size} a step, learning rate {settings.learning_rate:g}, seed {settings.seed}, {device.type}"
    )
    return f"{config.name}, {mask}, {settings.loss} loss", regime


def run_speed(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit status."""
    config = load_config(arguments.config)
    counts = str(arguments.candidates or config.workload.candidates).split(",")
    results = [
        measure_speed(
            config,
            users=arguments.users,
            history=arguments.history or config.workload.history,
            candidates=int(count),
            rounds=arguments.rounds,
            rows_at_once=arguments.rows_at_once,
            with_monolith=arguments.monolith,
            device=choose_device(arguments.device),
            clock=time.process_time if arguments.cpu_time else time.perf_counter,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        for count in counts
    ]
    result = {"command": describe_command(arguments), "results": results}
    text = json.dumps(result, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0


def describe_command(arguments: argparse.Namespace) -> str:
    """Return the command that measures the same again."""
    options = ("config", "candidates", "history", "users", "rounds", "rows_at_once", "threads")
    given = [(name, getattr(arguments, name)) for name in options]
    parts = [f"--{name.replace('_', '-')} {value}" for name, value in given if value is not None]
    flags = [f"--{name.replace('_', '-')}" for name in ("monolith", "cpu_time") if getattr(arguments, name)]
    return " ".join(["kvcast train speed", *parts, *flags])


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Give a question that is answered yes from the first Ctrl-C or SIGTERM on; the second does what it always does."""
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


if __name__ == "__main__":
    sys.exit(main())
