"""Time training steps with each history encoded once against steps with a row a candidate.

All ways take the same batch through the same kernels to the same loss and gradients (checked), alternating; the third,
for small sizes, is the monolith, every candidate a full sequence. Prints one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import ModelConfig, load_config
from kvcast.protocol.schema import Field
from kvcast.train.batches import Batch, pad_requests, score_batch
from kvcast.train.errors import TrainingError
from kvcast.train.objective import make_optimiser
from kvcast.train.requests import TrainingRequest
from kvcast.train.trainer import choose_device, make_trainable

# A way agrees if its loss and every gradient (relative to the largest) differ by no more than this, in fp32.
TOLERANCE = 1e-4
GROUPED, ROWS, MONOLITH = "grouped", "rows", "monolith"
LOSS = "loss"  # beside the names of parameters
Way = Callable[[RankingNetwork, Batch], float]


@dataclass(frozen=True)
class Regime:
    """The sizes of a measurement.

    users: requests of a step; history, candidates: L and N of each. rounds: timed steps each way, after one that warms
    up. rows_at_once: sequences in memory at once, where every candidate is a row; gradients are summed over them.
    """

    users: int
    history: int
    candidates: int
    rounds: int = 3
    rows_at_once: int = 16


def measure_speed(
    config: ModelConfig,
    regime: Regime,
    device: torch.device,
    *,
    with_monolith: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time training steps each way, alternating; return medians and ratios.

    Args:
        config: of the network.
        regime: sizes and rounds.
        device: where to compute.
        with_monolith: whether to time it too.
        clock: what to time with; `time.process_time` where the machine is busy with other things.
        say: receives lines of progress.

    Raises:
        TrainingError: the ways do not agree.
    """
    network = make_trainable(config, seed=0).to(device)
    batch = pad_requests(draw_requests(config, regime.users, regime.history, regime.candidates)).to(device)
    ways: dict[str, Way] = {GROUPED: learn_grouped, ROWS: make_row_way(regime.rows_at_once, score_calls)}
    if with_monolith:
        ways[MONOLITH] = make_row_way(regime.rows_at_once, score_monolith)
    agreement = compare_ways(network, batch, ways)
    seconds = time_ways(network, batch, ways, regime.rounds, clock, say)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "config": config.name,
        "layers": config.network.layers,
        "width": config.network.width,
        **vars(regime),
        "clock": clock.__name__,
        "machine": describe_machine(device),
        "step_seconds": seconds,
        "median_step_seconds": medians,
        "candidates_per_second": {name: regime.users * regime.candidates / each for name, each in medians.items()},
        "speedup": {name: each / medians[GROUPED] for name, each in medians.items() if name != GROUPED},
        "largest_difference": agreement,
    }


def time_ways(
    network: RankingNetwork,
    batch: Batch,
    ways: dict[str, Way],
    rounds: int,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Return the seconds of each step each way, alternating."""
    optimiser = make_optimiser(network, learning_rate=0.0, weight_decay=0.0)  # steps that change nothing
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            optimiser.zero_grad()
            started = clock()
            way(network, batch)
            optimiser.step()
            if batch.labels.is_cuda:
                torch.cuda.synchronize()
            elapsed = clock() - started
            if turn:
                seconds[name].append(elapsed)
            say(f"round {turn}/{rounds}, {name}: {elapsed:.3f} s{'' if turn else ' (warm-up)'}")
    return seconds


def learn_grouped(network: RankingNetwork, batch: Batch) -> float:
    """Add a batch's gradients, each history encoded once; return its loss."""
    return _learn(score_calls(network, batch), batch, batch.is_candidate.sum())


def score_calls(network: RankingNetwork, batch: Batch) -> Tensor:
    """Return scores by `encode_user` and `fuse`."""
    return score_batch(network, batch, "target_blind")


def score_monolith(network: RankingNetwork, batch: Batch) -> Tensor:
    """Return scores by `run_monolith`, as `ranker_full` does when it serves."""
    return network.run_monolith(batch.history, batch.candidates, "target_blind")[0]


def make_row_way(rows_at_once: int, score: Callable[[RankingNetwork, Batch], Tensor]) -> Way:
    """Return a way with a row a candidate, so many rows at once."""

    def learn(network: RankingNetwork, batch: Batch) -> float:
        count = batch.is_candidate.sum()
        return sum(_learn(score(network, rows), rows, count) for rows in split_rows(batch, rows_at_once))

    return learn


def split_rows(batch: Batch, rows_at_once: int) -> Iterator[Batch]:
    """Yield a batch as batches of one candidate a row."""
    request, place = batch.is_candidate.nonzero(as_tuple=True)  # [rows] each
    for start in range(0, len(request), rows_at_once):
        one, other = request[start : start + rows_at_once], place[start : start + rows_at_once]
        tensors = (batch.history[one], batch.candidates[one, other][:, None])
        yield Batch(*tensors, batch.labels[one, other][:, None], batch.is_candidate[one, other][:, None])


def compare_ways(network: RankingNetwork, batch: Batch, ways: dict[str, Way]) -> float:
    """Return the largest difference between loss and gradients of `GROUPED` and those of the others.

    Raises:
        TrainingError: it is more than `TOLERANCE`.
    """
    expected = collect_gradients(network, batch, ways[GROUPED])
    scale = max(float(each.abs().max()) for name, each in expected.items() if name != LOSS)
    worst = 0.0
    for name, way in ways.items():
        got = collect_gradients(network, batch, way)
        if got.keys() != expected.keys():
            raise TrainingError(f"{name}: gradients of other parameters than {GROUPED}")
        differences = {
            key: float((each - got[key]).abs().max()) / (1 if key == LOSS else scale) for key, each in expected.items()
        }
        key = max(differences, key=differences.__getitem__)
        if not differences[key] <= TOLERANCE:
            raise TrainingError(f"{name}: expected {key} of {GROUPED}, got a difference of {differences[key]:.2g}")
        worst = max(worst, differences[key])
    return worst


def collect_gradients(network: RankingNetwork, batch: Batch, way: Way) -> dict[str, Tensor]:
    """Return the loss and the gradients of one step."""
    network.zero_grad()
    loss = torch.tensor(way(network, batch))
    gradients = {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}
    network.zero_grad()
    return {LOSS: loss, **gradients}


def draw_requests(config: ModelConfig, users: int, history: int, candidates: int) -> list[TrainingRequest]:
    """Draw requests of random ids and labels, without padding and all of one size, which favours no way."""
    generator = np.random.default_rng(0)

    def draw(fields: tuple[Field, ...], rows: int) -> Any:
        return np.stack([generator.integers(1, each.vocab_size, rows) for each in fields], axis=1)

    return [
        TrainingRequest(
            user=str(user),
            time=0,
            history=draw(config.schema.history_fields, history),
            candidates=draw(config.schema.candidate_fields, candidates),
            labels=generator.integers(0, 2, candidates).astype(np.float32),
        )
        for user in range(users)
    ]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the machine and the versions that a figure was measured with."""
    on_gpu = device.type == "cuda"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "dtype": "FP32",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("kvcast", "torch", "numpy")},
    }


def _learn(scores: Tensor, batch: Batch, count: Tensor) -> float:
    """Add the gradients of the pointwise loss, a mean over `count` candidates; return this share of it."""
    losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, batch.labels, reduction="none")
    loss = torch.where(batch.is_candidate, losses, 0).sum() / count
    torch.autograd.backward(loss)
    return float(loss.item())


# ---- the command ----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `speed`."""
    parser.add_argument("--config", default="bench")
    parser.add_argument("--candidates", metavar="N,N,…", help="of a request (the configuration's workload)")
    parser.add_argument("--history", type=int, metavar="L", help="events of a request (the configuration's workload)")
    parser.add_argument("--users", type=int, default=2, help="requests of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=Regime.rounds, help="timed steps each way (%(default)s)")
    parser.add_argument(
        "--rows-at-once",
        type=int,
        default=Regime.rows_at_once,
        metavar="ROWS",
        help="sequences in memory, a row a candidate (%(default)s)",
    )
    parser.add_argument("--monolith", action="store_true", help="time the monolith too, without fast attention")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's CPU seconds: for a machine that is not idle"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit status."""
    config = load_config(arguments.config)
    history, workload = arguments.history or config.workload.history, config.workload
    results = [
        measure_speed(
            config,
            Regime(arguments.users, history, int(count), arguments.rounds, arguments.rows_at_once),
            choose_device(arguments.device),
            with_monolith=arguments.monolith,
            clock=time.process_time if arguments.cpu_time else time.perf_counter,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        for count in str(arguments.candidates or workload.candidates).split(",")
    ]
    text = json.dumps(
        {"command": describe_command(arguments, without=("device", "json")), "results": results}, indent=2
    )
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0


def describe_command(arguments: argparse.Namespace, without: tuple[str, ...] = ()) -> str:
    """Return the command, options that are not set left out and files by their names."""
    parts = [f"kvcast train {arguments.command}"]
    for name, value in vars(arguments).items():
        if name not in ("command", *without) and value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            texts = [each.name if isinstance(each, Path) else str(each) for each in values]
            parts += [f"--{name.replace('_', '-')}", *texts]
    return " ".join(parts)
