"""What grouping by user saves: a training step with one history for all candidates, against a row a candidate.

Both ways take the same batch through the same calls and kernels to the same loss; they differ in whether a history is
encoded once, or again for each of its candidates. A third, for small sizes, is the monolith, every candidate a full
sequence. They alternate, and every way's loss and gradients must be those of the first.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.schema import Field
from kvcast.train.batches import Batch, pad_requests, score_batch
from kvcast.train.errors import TrainingError
from kvcast.train.objective import make_optimiser
from kvcast.train.requests import TrainingRequest
from kvcast.train.trainer import make_trainable

# A way agrees if its loss and every gradient (relative to the largest) differ by no more than this, in fp32.
TOLERANCE = 1e-4
GROUPED, ROWS, MONOLITH = "grouped", "rows", "monolith"
Way = Callable[[RankingNetwork, Batch], float]


def measure_speed(  # noqa: PLR0913 each is one thing that is varied
    config: ModelConfig,
    *,
    users: int,
    history: int,
    candidates: int,
    rounds: int,
    rows_at_once: int,
    with_monolith: bool,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time training steps each way, alternating; return medians and ratios.

    Args:
        config: of the network.
        users: requests of a step.
        history: L of each.
        candidates: N of each.
        rounds: timed steps each way, after one that warms up.
        rows_at_once: sequences that a row-a-candidate way has in memory at once; gradients are summed over them.
        with_monolith: whether to time it too.
        device: where to compute.
        clock: what to time with; `time.process_time` where the machine is busy with other things.
        say: receives lines of progress.

    Raises:
        TrainingError: the ways do not agree.
    """
    network = make_trainable(config, seed=0).to(device)
    optimiser = make_optimiser(network, learning_rate=0.0, weight_decay=0.0)  # steps that change nothing
    batch = pad_requests(draw_requests(config, users, history, candidates)).to(device)
    ways: dict[str, Way] = {GROUPED: learn_grouped, ROWS: make_row_way(rows_at_once, score_calls)}
    if with_monolith:
        ways[MONOLITH] = make_row_way(rows_at_once, score_monolith)
    agreement = compare_ways(network, batch, ways)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            optimiser.zero_grad()
            started = clock()
            way(network, batch)
            optimiser.step()
            _synchronise(device)
            elapsed = clock() - started
            if turn:
                seconds[name].append(elapsed)
            say(f"round {turn}/{rounds}, {name}: {elapsed:.3f} s{'' if turn else ' (warm-up)'}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "config": config.name,
        "layers": config.network.layers,
        "width": config.network.width,
        "users": users,
        "history": history,
        "candidates": candidates,
        "rows_at_once": rows_at_once,
        "clock": clock.__name__,
        "machine": describe_machine(device),
        "step_seconds": seconds,
        "median_step_seconds": medians,
        "candidates_per_second": {name: users * candidates / median for name, median in medians.items()},
        "speedup": {name: median / medians[GROUPED] for name, median in medians.items() if name != GROUPED},
        "largest_difference": agreement,
    }


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
    """Return a way that gives every candidate a row, so many rows at once."""

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
    """Return the largest difference between the first way's loss and gradients and the others'.

    Raises:
        TrainingError: it is more than `TOLERANCE`.
    """
    found = {}
    for name, way in ways.items():
        network.zero_grad()
        loss = way(network, batch)
        found[name] = (
            loss,
            {key: each.grad.clone() for key, each in network.named_parameters() if each.grad is not None},
        )
    network.zero_grad()
    (loss, gradients), *others = found.values()
    worst = 0.0
    for name, (other_loss, other_gradients) in zip(list(ways)[1:], others, strict=True):
        if gradients.keys() != other_gradients.keys():
            raise TrainingError(f"{name}: gradients of other parameters than {GROUPED}")
        differences = {"loss": abs(loss - other_loss)}
        scale = max(float(each.abs().max()) for each in gradients.values())
        for key, gradient in gradients.items():
            differences[key] = float((gradient - other_gradients[key]).abs().max()) / scale
        key = max(differences, key=differences.__getitem__)
        if not differences[key] <= TOLERANCE:
            raise TrainingError(
                f"{name}: expected {key} as {GROUPED} has it, got a difference of {differences[key]:.2g}"
            )
        worst = max(worst, differences[key])
    return worst


def draw_requests(config: ModelConfig, users: int, history: int, candidates: int) -> list[TrainingRequest]:
    """Draw requests of random ids and labels, none of them padding: all of one size, which favours no way."""
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
    """Return what a figure has to say of where it was measured."""
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


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
