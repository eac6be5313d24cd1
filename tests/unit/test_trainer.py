"""Training: it learns, resumes bit for bit, and reports errors."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kvcast.networks.interface import build_network
from kvcast.networks.transformer import Transformer
from kvcast.networks.weights import load_weights
from kvcast.protocol.config import ModelConfig, load_config
from kvcast.protocol.errors import ConfigError
from kvcast.synthetic.shop import Shop
from kvcast.synthetic.truth import Effects, Habits, PlantedLog
from kvcast.train.__main__ import main
from kvcast.train.batches import SCHEMES, pad_requests, score_batch, score_requests
from kvcast.train.checkpoint import Checkpoint, read_checkpoint, write_tensors
from kvcast.train.errors import TrainingError
from kvcast.train.log import write_log
from kvcast.train.metrics import measure_ranking
from kvcast.train.objective import make_optimiser, shape_rate
from kvcast.train.speed import Regime, compare_ways, draw_requests, learn_grouped, measure_speed
from kvcast.train.trainer import (
    EVALUATIONS,
    Controls,
    Interrupted,
    Parts,
    RunFiles,
    Settings,
    Trainer,
    choose_device,
    describe_seconds,
    make_trainable,
)
from tests.support import make_config
from tests.train_data import draw_parts

CONFIG = make_config()
PARTS = draw_parts(CONFIG, 160)
CPU = torch.device("cpu")
SHORT = Settings(epochs=2, batch_size=16, learning_rate=3e-3, evaluate_every=4)
ROOT = Path(__file__).parents[2]


def make_trainer(folder: Path, settings: Settings = SHORT, parts: Parts = PARTS, **controls: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(
        CONFIG, settings, parts, RunFiles(folder / "w.safetensors"), CPU, Controls(**{"say": lambda _: None} | controls)
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def drop_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row.keys() - {"seconds", "examples_per_second"}} for row in rows]


def assert_same_run(one: Trainer, other: Trainer) -> None:
    """Weights, the best weights on disk and metrics are equal, bit for bit."""
    for name, weight in one.network.state_dict().items():
        assert torch.equal(weight, other.network.state_dict()[name]), name
    assert one.files.weights.read_bytes() == other.files.weights.read_bytes()
    assert drop_times(read_rows(one.files.metrics)) == drop_times(read_rows(other.files.metrics))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """An uninterrupted run."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.run()
    return trainer


def test_a_network_learns_from_the_history(tmp_path):
    parts = draw_parts(CONFIG, 800)
    settings = Settings(epochs=6, learning_rate=5e-3, evaluate_every=25)
    trainer = make_trainer(tmp_path, settings, parts)
    last = trainer.run()
    assert last["best_test"]["auc"] > 0.8
    assert last["popularity_test"]["auc"] < 0.6, "users differ, so popularity does not help"
    assert 0.7 < last["best_test"]["calibration"] < 1.4

    network = make_trainable(CONFIG, seed=1).requires_grad_(False).eval()
    load_weights(network, trainer.files.weights)
    scores = score_requests(network, parts.test, "target_blind", 7, CPU)
    again = measure_ranking([request.labels for request in parts.test], scores)
    assert again.auc == pytest.approx(last["best_test"]["auc"], abs=1e-4), "the file holds the weights that were judged"


def test_without_history_the_auc_stays_at_chance(tmp_path):
    settings = Settings(epochs=4, learning_rate=5e-3, evaluate_every=25, scheme="no_history")
    last = make_trainer(tmp_path, settings, draw_parts(CONFIG, 400)).run()
    assert 0.4 < last["best_test"]["auc"] < 0.6


@pytest.mark.parametrize("steps", [1, 4, 11, 19])
def test_an_interrupted_run_resumes_bit_for_bit(whole: Trainer, tmp_path, steps: int):
    countdown = iter(range(steps - 1, -1, -1))
    interrupted = make_trainer(tmp_path, should_stop=lambda: next(countdown) == 0)
    with pytest.raises(Interrupted):
        interrupted.run()
    assert interrupted.progress.step == steps
    torch.rand(3)  # what else drew meanwhile does not matter
    resumed = make_trainer(tmp_path)
    assert resumed.resume()
    assert resumed.progress.step == steps
    resumed.run()
    assert_same_run(whole, resumed)


def test_files_written_after_the_checkpoint_are_overwritten_on_resume(whole: Trainer, tmp_path):
    """As if the process was killed: later metrics and better weights are there, and the checkpoint is old."""
    countdown = iter((False, False, True))
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, should_stop=lambda: next(countdown)).run()
    killed = make_trainer(tmp_path)
    for path in (killed.files.weights, killed.files.metrics):
        path.write_bytes(
            {True: whole.files.weights, False: whole.files.metrics}[path == killed.files.weights].read_bytes()
        )
    resumed = make_trainer(tmp_path)
    resumed.resume()
    resumed.run()
    assert_same_run(whole, resumed)


def test_a_finished_run_is_not_trained_again(whole: Trainer, tmp_path):
    trainer = make_trainer(whole.files.weights.parent)
    weights = trainer.files.weights.read_bytes()
    trainer.files.weights.unlink()
    assert trainer.resume()
    assert trainer.run() == whole.progress.rows[-1]
    assert trainer.files.weights.read_bytes() == weights


def test_networks_with_dropout_resume_bit_for_bit(tmp_path):
    config = dataclasses.replace(
        CONFIG, network=dataclasses.replace(CONFIG.network, family="tests.unit.test_trainer:DropsOut")
    )

    def train(folder: Path, stop_after: int) -> Trainer:
        folder.mkdir(exist_ok=True)
        countdown = iter(range(stop_after, -1, -1))
        controls = Controls(say=lambda _: None, should_stop=lambda: next(countdown, 1) == 0)
        trainer = Trainer(config, SHORT, PARTS, RunFiles(folder / "w.safetensors"), CPU, controls)
        trainer.resume()
        try:
            trainer.run()
        except Interrupted:
            torch.manual_seed(99)
        return trainer

    whole = train(tmp_path / "whole", stop_after=1000)
    train(tmp_path / "parts", stop_after=5)
    assert_same_run(whole, train(tmp_path / "parts", stop_after=1000))


class DropsOut(Transformer):
    """A network whose training draws random numbers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.2)

    def _embed_candidates(self, candidates: torch.Tensor) -> torch.Tensor:
        return self.dropout(super()._embed_candidates(candidates))


def test_the_seed_decides_the_weights(whole: Trainer, tmp_path):
    again = make_trainer(tmp_path / "again")
    again.run()
    assert_same_run(whole, again)
    other = make_trainer(tmp_path / "other", dataclasses.replace(SHORT, seed=1))
    other.run()
    assert not torch.equal(whole.network.state_dict()["score.weight"], other.network.state_dict()["score.weight"])


def test_early_stopping_keeps_the_best_weights(tmp_path):
    settings = dataclasses.replace(SHORT, epochs=50, learning_rate=0.05, patience=2, evaluate_every=5)
    trainer = make_trainer(tmp_path, settings)
    last = trainer.run()
    *rows, _ = read_rows(trainer.files.metrics)
    aucs = [row["validation"]["auc"] for row in rows]
    assert len(rows) == aucs.index(max(aucs)) + 1 + settings.patience
    assert trainer.progress.step < trainer.steps
    assert last["step"] == rows[aucs.index(max(aucs))]["step"]
    assert last["best_validation"]["auc"] == max(aucs)
    assert [row["is_best"] for row in rows] == [auc > max([0, *aucs[:place]]) for place, auc in enumerate(aucs)]


def test_metrics_have_a_row_per_evaluation_and_a_final_row(whole: Trainer):
    *rows, last = read_rows(whole.files.metrics)
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    for row in rows:
        assert {"epoch", "train_loss", "learning_rate", "examples_per_second", "seconds"} <= row.keys()
        assert row["validation"]["requests"] == len(PARTS.validation)
        assert row["train_loss"] > 0
        assert row["examples_per_second"] > 0
    assert last["best_test"]["requests"] == len(PARTS.test)
    assert last["steps_taken"] == 20


def make_clock() -> Callable[[], float]:
    """Return a clock on which a millisecond passes from one look to the next: some ten a step."""
    ticks = itertools.count()
    return lambda: next(ticks) / 1000


def test_a_time_limit_ends_a_run_with_an_evaluation(tmp_path):
    settings = dataclasses.replace(SHORT, epochs=10_000, evaluate_every=10**6)
    trainer = make_trainer(tmp_path, settings, seconds=0.3, clock=make_clock())
    last = trainer.run()
    assert 10 < last["step"] == last["steps_taken"] < 100
    assert trainer.files.weights.exists()


def test_with_a_time_limit_the_learning_rate_decays_with_time(tmp_path):
    settings = dataclasses.replace(SHORT, epochs=10_000, patience=1000, evaluate_every=0)
    trainer = make_trainer(tmp_path, settings, seconds=1.5, clock=make_clock())
    trainer.run()
    rows = [row for row in trainer.progress.rows if "validation" in row]
    rates = [row["learning_rate"] for row in rows]
    assert 3 <= len(rows) <= EVALUATIONS + 1
    assert max(rates) > 0.5 * settings.learning_rate
    assert rates[-1] < 0.1 * settings.learning_rate
    assert trainer.progress.step < trainer.steps


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_metadata_records_the_training_scheme(tmp_path, scheme: str):
    trainer = make_trainer(tmp_path, dataclasses.replace(SHORT, scheme=scheme, steps=2))
    trainer.run()
    with safe_open(trainer.files.weights, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["kvcast.mask"] == ("undirected" if scheme == "undirected" else "target_blind")
    assert metadata["kvcast.history"] == ("none" if scheme == "no_history" else "encoded")
    assert (metadata["kvcast.config"], metadata["kvcast.seed"], metadata["kvcast.steps"]) == ("small", "0", "2")
    network = make_trainable(CONFIG, seed=1).requires_grad_(False)
    refused = pytest.raises(ConfigError, match="trained with histories, got kvcast")
    with refused if scheme == "no_history" else contextlib.nullcontext():
        load_weights(network, trainer.files.weights, accept_undirected=scheme == "undirected")


def test_undirected_training_trains_the_undirected_network(tmp_path):
    trainer = make_trainer(tmp_path, dataclasses.replace(SHORT, scheme="undirected", steps=1))
    batch = pad_requests(PARTS.training[:4])
    before = score_batch(trainer.network, batch, "undirected")
    assert not torch.allclose(before, score_batch(trainer.network, batch, "target_blind"), atol=1e-6)
    trainer.run()
    assert not torch.allclose(before, score_batch(trainer.network, batch, "undirected"), atol=1e-6)


def test_embeddings_norms_and_biases_do_not_decay():
    network = make_trainable(CONFIG, seed=0)
    optimiser = make_optimiser(network, 1e-3, 0.1)
    decay = {id(each): group["weight_decay"] for group in optimiser.param_groups for each in group["params"]}
    for name, parameter in network.named_parameters():
        is_matrix = parameter.ndim == 2 and not name.startswith(("embeddings", "positions", "types"))
        assert decay[id(parameter)] == (0.1 if is_matrix else 0.0), name
    assert len(decay) == len(list(network.parameters()))


def test_the_learning_rate_warms_up_and_then_decays():
    rates = [shape_rate(step, warmup=10, steps=100) for step in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1)
    assert 0 < rates[-1] < 0.02


# What cannot be trained


def change_first(**changes: Any) -> Parts:
    first, *others = PARTS.training
    return Parts([dataclasses.replace(first, **changes), *others], PARTS.validation)


def with_labels(value: float) -> Parts:
    training = [dataclasses.replace(each, labels=np.full_like(each.labels, value)) for each in PARTS.training]
    return Parts(training, PARTS.validation)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (with_labels(0), "the training part of the log has no positive label among"),
        (with_labels(1), "the training part of the log has no negative label among"),
        (Parts([], PARTS.validation), "the training part of the log has no request"),
        (Parts(PARTS.training, []), "the validation part of the log has no request"),
        (
            change_first(history=np.ones((2, 3), np.int64)),
            r"request 0 of the training part .* does not fit small: history",
        ),
        (change_first(candidates=np.full((4, 4), 999)), "does not fit small: candidates"),
        (change_first(labels=np.ones(50, np.float32)), "expected a label of 0 or 1 for each of"),
        (change_first(labels=0.5 * PARTS.training[0].labels), "expected a label of 0 or 1 for each of"),
    ],
)
def test_unusable_training_data_is_rejected(tmp_path, parts: Parts, message: str):
    with pytest.raises(TrainingError, match=message):
        make_trainer(tmp_path, parts=parts)


def test_a_non_finite_loss_ends_the_run_and_keeps_the_best_weights(tmp_path):
    trainer = make_trainer(tmp_path, should_stop=lambda: trainer.progress.step == 5 and ruin(trainer))
    with pytest.raises(TrainingError, match=r"step 6: expected a finite loss .* step 4, are in .*w.safetensors"):
        trainer.run()
    weights = load_file(trainer.files.weights)
    assert all(each.isfinite().all() for each in weights.values())
    assert trainer.progress.step == 5, "the step was not taken"


def ruin(trainer: Trainer) -> bool:
    with torch.no_grad():
        trainer.network.get_parameter("score.weight").fill_(float("inf"))
    return False


def test_all_invalid_settings_are_reported_together():
    with pytest.raises(TrainingError, match=r"epochs: .*got 0; batch_size: .*got -1; .*warmup: .*got 1.5"):
        Settings(epochs=0, batch_size=-1, warmup=1.5)


def test_a_missing_output_folder_is_rejected(tmp_path):
    with pytest.raises(TrainingError, match=r"the folder .*nowhere does not exist"):
        RunFiles(tmp_path / "nowhere" / "w.safetensors")
    with pytest.raises(TrainingError, match="expected a file to write, got a folder"):
        RunFiles(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_only_with_device_cuda():
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(TrainingError, match="finds no GPU here"):
        choose_device("cuda")


# Checkpoints


def test_a_checkpoint_of_another_run_is_rejected_with_every_difference(whole: Trainer):
    other = make_trainer(
        whole.files.weights.parent, dataclasses.replace(SHORT, seed=3, batch_size=8), draw_parts(CONFIG, 160, seed=5)
    )
    with pytest.raises(TrainingError) as caught:
        other.resume()
    message = str(caught.value)
    assert "settings.seed: 0 in the checkpoint, 3 now" in message
    assert "settings.batch_size: 16 in the checkpoint, 8 now" in message
    assert "data.training" in message
    assert "learning_rate" not in message


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    assert not make_trainer(tmp_path).resume()


def test_a_file_that_is_not_a_checkpoint_is_rejected(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.files.checkpoint.write_bytes(b"something else")
    with pytest.raises(TrainingError, match="cannot be read as safetensors"):
        trainer.resume()
    save_file({"a": torch.ones(2)}, trainer.files.checkpoint)
    with pytest.raises(TrainingError, match="this is not a checkpoint"):
        trainer.resume()


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(5.0), "a": torch.ones(3, 2, dtype=torch.int64)}
    metadata = {str(number): "é" * number for number in range(8)}
    contents = set()
    for number in range(8):
        write_tensors(tmp_path / f"{number}", tensors, metadata)
        contents.add((tmp_path / f"{number}").read_bytes())
    assert len(contents) == 1
    for name, tensor in load_file(tmp_path / "0").items():
        assert torch.equal(tensor, tensors[name])
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata


WRITER = """
import sys, torch
from pathlib import Path
from kvcast.train.checkpoint import Checkpoint
for number in range(10**6):
    tensors = {"group": {"tensor": torch.full((2_000_000,), float(number))}}
    Checkpoint(tensors, {"number": number}).write(Path(sys.argv[1]))
    print(number, flush=True)
"""


def test_a_kill_during_a_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        writer.stdout.readline()
        while not list(tmp_path.glob(".*.tmp")):
            pass
        writer.kill()
        written = [int(line) for line in writer.stdout.read().split()]
    checkpoint = read_checkpoint(path)
    assert checkpoint.state["number"] >= max([1, *written])
    assert (checkpoint.tensors["group"]["tensor"] == checkpoint.state["number"]).all()


def test_a_write_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    Checkpoint({"group": {"tensor": torch.ones(3)}}, {"number": 1}).write(path)

    def fail(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        Checkpoint({"group": {"tensor": torch.zeros(3)}}, {"number": 2}).write(path)
    assert read_checkpoint(path).state == {"number": 1}
    assert list(tmp_path.iterdir()) == [path]


# Speed


def test_grouped_steps_and_row_steps_agree_and_are_timed():
    result = measure_speed(
        CONFIG,
        Regime(users=2, history=20, candidates=6, rounds=2, rows_at_once=5),
        CPU,
        with_monolith=True,
        say=lambda _: None,
    )
    assert result["largest_difference"] < 1e-4
    assert {len(times) for times in result["step_seconds"].values()} == {2}
    median = result["median_step_seconds"]
    assert result["speedup"] == {name: median[name] / median["grouped"] for name in ("rows", "monolith")}
    json.dumps(result)


def test_a_way_with_other_gradients_is_rejected():
    network = make_trainable(CONFIG, seed=0)
    batch = pad_requests(draw_requests(CONFIG, 2, 8, 3))

    def learn_twice(network: nn.Module, batch: Any) -> float:
        learn_grouped(network, batch)
        return learn_grouped(network, batch)

    with pytest.raises(TrainingError, match=r"twice: expected .* of grouped"):
        compare_ways(network, batch, {"grouped": learn_grouped, "twice": learn_twice})


def test_durations_are_formatted():
    assert [describe_seconds(each) for each in (0.4, 59.6, 245, 7380)] == [
        "0 s",
        "1 min 00 s",
        "4 min 05 s",
        "2 h 03 min",
    ]


# The command


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log whose users have strong tastes."""
    schema = load_config("tiny").schema
    effects = Effects(taste=6.0, recency=0.0, quality=0.3, price=0.0, base=-3.0)
    rows = PlantedLog(
        Shop(schema, items=40, categories=8), Habits(users=150, days=8, shown=8), seed=1, effects=effects
    ).draw_rows()
    path = tmp_path_factory.mktemp("log") / "clicks.parquet"
    write_log(path, rows.columns, schema)
    return path


def test_the_command_learns_from_a_log(log_file, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    options = ["--learning-rate", "5e-3", "--epochs", "4", "--evaluate-every", "30", "--threads", "1"]
    assert main(["--config", "tiny", "--log", str(log_file), "--out", str(out), *options]) == 0
    *_, last = read_rows(tmp_path / "weights.metrics.jsonl")
    auc, popularity = (last[key]["auc"] for key in ("best_validation", "popularity_validation"))
    assert auc > max(0.7, popularity + 0.1)
    assert (tmp_path / "weights.metrics.png").read_bytes().startswith(b"\x89PNG")
    load_weights(build_network(load_config("tiny")), out)
    printed = capsys.readouterr().out
    assert "(best so far)" in printed
    assert "popularity alone: AUC" in printed


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(log_file, tmp_path):
    options = ["--config", "tiny", "--log", str(log_file), "--steps", "12", "--threads", "1", "--evaluate-every", "4"]
    assert main([*options, "--out", str(tmp_path / "whole.safetensors")]) == 0
    command = [sys.executable, "-m", "kvcast", "train", *options, "--out", str(tmp_path / "parts.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 4/"):
                process.send_signal(signal.SIGINT)
        assert "interrupted after step" in line
    assert process.returncode == 130
    assert main([*options, "--out", str(tmp_path / "parts.safetensors"), "--resume"]) == 0
    whole, parts = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "nowhere/w.safetensors"], "the folder nowhere does not exist"),
        (["--log", "missing.parquet"], "missing.parquet"),
        (["--epochs", "0"], "epochs: expected more than 0, got 0"),
    ],
)
def test_the_command_reports_errors_before_training(log_file, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    given = ["--config", "tiny", "--log", str(log_file), "--out", "w.safetensors", *options]
    assert main(given) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_times_a_step(tmp_path, capsys):
    file = tmp_path / "speed.json"
    sizes = ["--candidates", "2,4", "--history", "10", "--users", "1", "--rounds", "1"]
    assert main(["speed", "--config", "tiny", *sizes, "--cpu-time", "--json", str(file)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(file.read_text())
    assert [result["candidates"] for result in document["results"]] == [2, 4]
    assert document["results"][0]["clock"] == "process_time"
    assert "--candidates 2,4 --history 10" in document["command"]
    assert document["command"].endswith("--cpu-time")
