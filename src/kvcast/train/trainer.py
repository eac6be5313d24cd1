"""The training loop: steps, evaluations, early stopping, checkpoints.

A run is determined by configuration, settings and data: on one CPU thread it gives the same weights bit for bit,
interrupted or not.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcast.networks.interface import RankingNetwork, build_network
from kvcast.networks.weights import (
    ENCODED,
    HISTORY_METADATA_KEY,
    MASK_METADATA_KEY,
    NONE,
    draw_weights,
    name_fully,
    name_once,
)
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.validation import check_candidates, check_history
from kvcast.train.batches import (
    Ids,
    Scheme,
    measure_sizes,
    pad_requests,
    plan_batches,
    score_batch,
    score_requests,
)
from kvcast.train.checkpoint import (
    Checkpoint,
    pack_optimiser,
    pack_random_state,
    read_checkpoint,
    unpack_optimiser,
    unpack_random_state,
    write_tensors,
)
from kvcast.train.errors import TrainingError
from kvcast.train.metrics import Metrics, measure_ranking, score_by_popularity
from kvcast.train.objective import LossKind, make_optimiser, measure_loss, shape_rate
from kvcast.train.requests import TrainingRequest

# How often a long run prints its progress, and how much of it an interruption can lose.
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_CHECKPOINTS = 60.0
# Evaluations of a run by default.
EVALUATIONS = 20
# In a run with a time limit, training takes at least this many times as long as evaluation.
LEARNING_SHARE = 6
# Families draw embeddings of unit size, so that every part of a random network affects a score; training starts with
# small ones.
EMBEDDING_SCALE = 0.02


@dataclass(frozen=True)
class Settings:
    """The settings that, with configuration and data, determine the weights.

    epochs: passes over the training part, or fewer if `steps` are fewer. batch_size: requests of a step. warmup: of the
    learning rate, a share of all steps. gradient_limit: on the norm of all gradients. evaluate_every: steps; 0 divides
    the run into `EVALUATIONS`. patience: evaluations without a better AUC after which a run ends.
    """

    seed: int = 0
    scheme: Scheme = "target_blind"
    loss: LossKind = "pointwise"
    epochs: int = 5
    steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    gradient_limit: float = 1.0
    evaluate_every: int = 0
    patience: int = 4

    def __post_init__(self) -> None:
        """Check the numbers."""
        positive = ("epochs", "batch_size", "learning_rate", "gradient_limit", "patience")
        wrong = [
            f"{name}: expected more than 0, got {getattr(self, name)}"
            for name in positive
            if not getattr(self, name) > 0
        ]
        if self.steps is not None and self.steps < 1:
            wrong.append(f"steps: expected at least 1, got {self.steps}")
        if not 0 <= self.warmup < 1:
            wrong.append(f"warmup: expected a share of the steps, 0 to 1, got {self.warmup}")
        if self.weight_decay < 0 or self.evaluate_every < 0 or self.seed < 0:
            wrong.append("weight_decay, evaluate_every, seed: expected 0 or more")
        if wrong:
            raise TrainingError("; ".join(wrong))


@dataclass(frozen=True)
class Parts:
    """The requests to train on, those that select the best weights, and those that evaluate them."""

    training: Sequence[TrainingRequest]
    validation: Sequence[TrainingRequest]
    test: Sequence[TrainingRequest] = ()


@dataclass(frozen=True)
class RunFiles:
    """The files of a run: the best weights, and beside them metrics, plot and checkpoint."""

    weights: Path

    def __post_init__(self) -> None:
        """Check before training that the weights can be written."""
        if not self.weights.parent.is_dir():
            raise TrainingError(f"--out {self.weights}: the folder {self.weights.parent} does not exist")
        if self.weights.is_dir():
            raise TrainingError(f"--out {self.weights}: expected a file to write, got a folder")

    @property
    def metrics(self) -> Path:
        """One JSON document a line."""
        return self.weights.with_name(f"{self.weights.stem}.metrics.jsonl")

    @property
    def plot(self) -> Path:
        """The metrics as a PNG."""
        return self.weights.with_name(f"{self.weights.stem}.metrics.png")

    @property
    def checkpoint(self) -> Path:
        """The state that `--resume` needs."""
        return self.weights.with_name(f"{self.weights.stem}.checkpoint.safetensors")


@dataclass
class Progress:
    """The state of a run that is not a tensor.

    epoch, batch: of the next step. place: how far that is, in steps or by the time that a run may take. loss_sum,
    loss_count, candidates, step_seconds: since the last evaluation.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    place: int = 0
    best_step: int = 0
    best_auc: float = -math.inf
    stale: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    candidates: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0
    is_finished: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def begin_interval(self) -> None:
        """Start the sums again after an evaluation."""
        self.loss_sum, self.loss_count, self.candidates, self.step_seconds = 0.0, 0, 0, 0.0


@dataclass(frozen=True)
class Controls:
    """Progress, interruption and time limit; none affects the weights of a run that takes all its steps.

    say: receives lines of progress. should_stop: called after each step; if true, the run writes a checkpoint and ends.
    seconds: the time limit. Where it comes before the last step, learning rate and evaluations follow the time instead
    of the steps, so that the run ends at a low rate; it is not repeatable then. clock: returns seconds.
    """

    say: Callable[[str], None] = print
    should_stop: Callable[[], bool] = lambda: False
    seconds: float = math.inf
    clock: Callable[[], float] = time.monotonic


class Interrupted(TrainingError):  # noqa: N818 not an error
    """The run was asked to end; its checkpoint is written."""


class Trainer:
    """One run. `run` trains to the end; `resume`, called before, continues an interrupted run."""

    def __init__(
        self,
        config: ModelConfig,
        settings: Settings,
        parts: Parts,
        files: RunFiles,
        device: torch.device,
        controls: Controls | None = None,
    ) -> None:
        """Build the network and check the data.

        Raises:
            TrainingError: the data cannot be used for training.
        """
        self.identity = describe_run(config, settings, parts)
        self.settings, self.files, self.progress = settings, files, Progress()
        self._config, self._parts, self._device = config, parts, device
        self._controls = controls or Controls()
        self._say, self._clock = self._controls.say, self._controls.clock
        self._run_started = self._saved = self._said = self._clock()
        self._evaluated = self._evaluation_seconds = 0.0
        self._sizes = measure_sizes(parts.training)
        self._epoch_steps = len(self._plan_epoch(0))
        self.steps = min(settings.epochs * self._epoch_steps, settings.steps or sys.maxsize)
        self.network = make_trainable(config, settings.seed).to(device)
        self._optimiser = make_optimiser(self.network, settings.learning_rate, settings.weight_decay)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, self._shape_rate)
        self._best: dict[str, Tensor] = {}
        torch.manual_seed(settings.seed)  # for networks with dropout

    def resume(self) -> bool:
        """Continue the run of the checkpoint; return whether there is one.

        Raises:
            TrainingError: the checkpoint is of another run; every difference is named.
        """
        if not self.files.checkpoint.exists():
            return False
        checkpoint = read_checkpoint(self.files.checkpoint)
        check_same_run(checkpoint.state["run"], self.identity, self.files.checkpoint)
        self.network.load_state_dict(name_fully(self.network, checkpoint.tensors["network"]))
        unpack_optimiser(self._optimiser, checkpoint.tensors["optimiser"], checkpoint.state["optimiser"])
        self._schedule.load_state_dict(checkpoint.state["schedule"])
        unpack_random_state(checkpoint.tensors["random"])
        self._best = dict(checkpoint.tensors.get("best", {}))
        self.progress = Progress(**checkpoint.state["progress"])
        self._run_started -= self.progress.seconds
        return True

    def run(self) -> dict[str, Any]:
        """Train to the end; write weights, metrics and checkpoints; return the last row of the metrics.

        Raises:
            TrainingError: a loss or a score is not finite.
            Interrupted: `should_stop` returned true.
        """
        self._write_metrics()
        if self._best:
            self._write_weights()  # those of the checkpoint: later steps are repeated
        if not self.progress.is_finished:
            while self._run_epoch():
                self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0
        return self.progress.rows[-1]

    def _run_epoch(self) -> bool:
        """Learn from the rest of an epoch; return whether the run goes on."""
        for indices in self._plan_epoch(self.progress.epoch)[self.progress.batch :]:
            self._take_step(indices)
            self._evaluate_if_due()
            self._save_if_due()
            if self.progress.is_finished:
                return False
        return True

    def _count_seconds(self) -> float:
        return self._clock() - self._run_started

    def _find_place(self, step: int) -> int:
        """Return the progress in steps: as many as were taken, or more if the time limit comes first."""
        return max(step, math.floor(self.steps * min(1.0, self._count_seconds() / self._controls.seconds)))

    def _shape_rate(self, step: int) -> float:
        return shape_rate(self._find_place(step), round(self.settings.warmup * self.steps), self.steps)

    def _plan_epoch(self, epoch: int) -> list[Ids]:
        return plan_batches(self._sizes, self.settings.batch_size, [self.settings.seed, epoch])

    def _take_step(self, indices: Ids) -> None:
        """Learn from one batch."""
        started = self._clock()
        batch = pad_requests([self._parts.training[index] for index in indices]).to(self._device)
        loss = measure_loss(score_batch(self.network, batch, self.settings.scheme), batch, self.settings.loss)
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_limit)
        self._expect_finite(loss, norm)
        self._optimiser.step()
        self._schedule.step()
        progress = self.progress
        progress.step, progress.batch = progress.step + 1, progress.batch + 1
        progress.loss_sum, progress.loss_count = progress.loss_sum + loss.item(), progress.loss_count + 1
        progress.candidates += int(self._sizes[indices, 1].sum())
        progress.step_seconds += self._clock() - started
        if self._clock() - self._said > SECONDS_BETWEEN_LINES:
            self._say(self._describe_progress())
            self._said = self._clock()

    def _expect_finite(self, loss: Tensor, norm: Tensor) -> None:
        if loss.isfinite() and norm.isfinite():
            return
        raise TrainingError(
            f"step {self.progress.step + 1}: expected a finite loss and finite gradients, got a loss of "
            f"{loss.item():.4g} and a gradient norm of {norm.item():.4g}; {self._kept()}. "
            "Try a lower --learning-rate or a longer --warmup"
        )

    def _kept(self) -> str:
        if not self._best:
            return "no weights were written, because there was no evaluation yet"
        return f"the best weights, of step {self.progress.best_step}, are in {self.files.weights}"

    def _evaluate_if_due(self) -> None:
        every = self.settings.evaluate_every or max(1, self.steps // EVALUATIONS)
        place, before = self._find_place(self.progress.step), self.progress.place
        self.progress.place = place
        is_last = place >= self.steps
        if is_last or (place // every > before // every and self._may_evaluate(place)):
            self._evaluate()
            if is_last or self.progress.stale >= self.settings.patience:
                self._finish()

    def _may_evaluate(self, place: int) -> bool:
        """Whether a run with a time limit has trained long enough since its last evaluation."""
        is_short = place > self.progress.step
        return not is_short or self._count_seconds() > self._evaluated + LEARNING_SHARE * self._evaluation_seconds

    def _evaluate(self) -> None:
        """Measure the validation part; save the weights if they are the best so far."""
        progress, started = self.progress, self._count_seconds()
        metrics = self._measure(self._parts.validation)
        is_best = metrics.auc > progress.best_auc
        row = {
            "step": progress.step,
            "epoch": round(progress.epoch + progress.batch / self._epoch_steps, 3),
            "train_loss": progress.loss_sum / progress.loss_count,
            "validation": metrics.to_json(),
            "is_best": is_best,
            "learning_rate": self._schedule.get_last_lr()[0],
            "examples_per_second": round(progress.candidates / progress.step_seconds, 1),
            "seconds": round(self._count_seconds(), 2),
        }
        progress.rows.append(row)
        progress.begin_interval()
        if is_best:
            progress.best_auc, progress.best_step, progress.stale = metrics.auc, progress.step, 0
            own = name_once(self.network, self.network.state_dict())
            self._best = {name: weight.cpu().clone() for name, weight in own.items()}
            self._write_weights()
        else:
            progress.stale += 1
        self._write_metrics()
        self._say(f"step {progress.step}/{self.steps}: {metrics.describe()}{' (best so far)' if is_best else ''}")
        self._evaluated = self._count_seconds()
        self._evaluation_seconds = self._evaluated - started

    def _finish(self) -> None:
        """Measure the best weights on the validation and test parts."""
        progress = self.progress
        self.network.load_state_dict(name_fully(self.network, self._best))
        row: dict[str, Any] = {"step": progress.best_step, "steps_taken": progress.step}
        judges = {"validation": self._parts.validation} | ({"test": self._parts.test} if self._parts.test else {})
        for name, requests in judges.items():
            labels = [request.labels for request in requests]
            popularity = measure_ranking(labels, score_by_popularity(self._parts.training, requests))
            trained = self._measure(requests)
            row |= {f"best_{name}": trained.to_json(), f"popularity_{name}": popularity.to_json()}
            self._say(f"{name}, weights of step {progress.best_step}: {trained.describe()}")
            self._say(f"{name}, popularity alone: {popularity.describe()}")
        row["seconds"] = round(self._count_seconds(), 2)
        progress.rows.append(row)
        progress.is_finished = True
        self._write_metrics()
        self._save()

    def _measure(self, requests: Sequence[TrainingRequest]) -> Metrics:
        scores = score_requests(self.network, requests, self.settings.scheme, self.settings.batch_size, self._device)
        if not all(np.isfinite(each).all() for each in scores):
            raise TrainingError(
                f"step {self.progress.step}: expected finite scores, got NaN or infinity; {self._kept()}"
            )
        return measure_ranking([request.labels for request in requests], scores)

    def _save_if_due(self) -> None:
        is_due = self._clock() - self._saved > SECONDS_BETWEEN_CHECKPOINTS
        should_stop = self._controls.should_stop()
        if self.progress.is_finished or not (is_due or should_stop):
            return
        self._save()
        if should_stop:
            raise Interrupted

    def _save(self) -> None:
        self.progress.seconds = self._count_seconds()
        optimiser, groups = pack_optimiser(self._optimiser)
        tensors = {
            "network": name_once(self.network, self.network.state_dict()),
            "best": self._best,
            "optimiser": optimiser,
            "random": pack_random_state(),
        }
        state = {
            "run": self.identity,
            "progress": dataclasses.asdict(self.progress),
            "optimiser": groups,
            "schedule": self._schedule.state_dict(),
        }
        Checkpoint(tensors, state).write(self.files.checkpoint)
        self._saved = self._clock()

    def _write_weights(self) -> None:
        config, settings = self._config, self.settings
        mask = "undirected" if settings.scheme == "undirected" else "target_blind"
        metadata = {
            "kvcast.config": config.name,
            "kvcast.network": config.network.family,
            MASK_METADATA_KEY: mask,
            HISTORY_METADATA_KEY: NONE if settings.scheme == "no_history" else ENCODED,
            "kvcast.seed": str(settings.seed),
            "kvcast.steps": str(self.progress.best_step),
        }
        write_tensors(self.files.weights, self._best, metadata)

    def _write_metrics(self) -> None:
        """Write all rows; rows written after the checkpoint of a resumed run are overwritten."""
        self.files.metrics.write_text("".join(json.dumps(row) + "\n" for row in self.progress.rows))

    def _describe_progress(self) -> str:
        progress = self.progress
        rate = progress.candidates / progress.step_seconds
        left = (self.steps - progress.step) * progress.step_seconds / max(1, progress.loss_count)
        return (
            f"step {progress.step}/{self.steps} (epoch {progress.epoch + 1}): "
            f"loss {progress.loss_sum / max(1, progress.loss_count):.4f}, {rate:.0f} candidates/s, "
            f"{describe_seconds(left)} of steps left at most"
        )


def make_trainable(config: ModelConfig, seed: int) -> RankingNetwork:
    """Build the network that is served, with random weights from a seed, in training mode."""
    network = build_network(config)
    draw_weights(network, seed)
    tables = {
        id(module.weight): module.weight for module in network.modules() if isinstance(module, torch.nn.Embedding)
    }
    for table in tables.values():  # a tied one once
        table.mul_(EMBEDDING_SCALE)
    return network.requires_grad_(True).train()


def choose_device(name: str) -> torch.device:
    """Return the device of `auto`, `cpu` or `cuda`.

    Raises:
        TrainingError: `cuda` is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            f"--device cuda: PyTorch {torch.__version__} finds no GPU here; --device auto takes the CPU then"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_run(config: ModelConfig, settings: Settings, parts: Parts) -> dict[str, Any]:
    """Check the data, and return what determines the weights: a resumed run must have the same.

    Raises:
        TrainingError: a part is empty, a request does not fit the configuration, or a part has labels of one kind only.
    """
    data = {name: check_part(name, getattr(parts, name), config) for name in ("training", "validation")}
    if parts.test:
        data["test"] = check_part("test", parts.test, config)
    described = {"config": config.list_settings(), "settings": dataclasses.asdict(settings), "data": data}
    return dict(json.loads(json.dumps(described)))


def check_part(name: str, requests: Sequence[TrainingRequest], config: ModelConfig) -> str:
    """Check one part of the data; return its fingerprint.

    Raises:
        TrainingError: as `describe_run` says.
    """
    if not len(requests):
        raise TrainingError(f"the {name} part of the log has no request")
    digest, positives, candidates = hashlib.sha256(), 0, 0
    for index, request in enumerate(requests):
        try:
            check_history(request.history[None], config.schema.history_fields, config.limits)
            check_candidates(request.candidates[None], config.schema.candidate_fields, config.limits)
        except InvalidRequestError as error:
            raise TrainingError(
                f"request {index} of the {name} part (user {request.user}) does not fit {config.name}: {error}"
            ) from error
        is_positive = request.labels == 1
        if request.labels.shape != request.candidates.shape[:1] or not (is_positive | (request.labels == 0)).all():
            raise TrainingError(
                f"request {index} of the {name} part (user {request.user}): expected a label of 0 or 1 for each of "
                f"{len(request.candidates)} candidates, got {request.labels.tolist()}"
            )
        positives, candidates = positives + int(is_positive.sum()), candidates + len(request.labels)
        for array in (request.history, request.candidates, request.labels):
            digest.update(array.tobytes())
    for kind, count in (("positive", positives), ("negative", candidates - positives)):
        if count == 0:
            raise TrainingError(
                f"the {name} part of the log has no {kind} label among {candidates}: a ranking cannot be learnt"
            )
    return digest.hexdigest()


def check_same_run(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint is of this run.

    Raises:
        TrainingError: it is not; every difference is named.
    """
    one, other = flatten(found), flatten(expected)
    differences = [
        f"{name}: {one.get(name)} in the checkpoint, {other.get(name)} now"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]
    if differences:
        raise TrainingError(
            f"checkpoint {path} is of another run; omit --resume to start a new one:\n  " + "\n  ".join(differences)
        )


def flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables, named by their paths."""
    leaves: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def describe_seconds(seconds: float) -> str:
    """Return `2 h 03 min`, `4 min 05 s` or `9 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
