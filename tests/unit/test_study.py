"""The study of what the mask costs: every way on every log, intervals, and nothing done twice."""

import json
import re

import pytest

from kvcast.protocol.config import parse_config
from kvcast.protocol.log import TRUTH
from kvcast.synthetic import Habits, PlantedLog, Shop
from kvcast.synthetic.truth import compute_best_auc
from kvcast.train import __main__ as command
from kvcast.train.log import write_log
from kvcast.train.study import WAYS, find_interval, summarise

TABLE = {
    "name": "small",
    "network": {"family": "transformer", "layers": 2, "heads": 2, "width": 8},
    "vocabularies": {"item": 100, "action": 64, "category": 64},
    "fields": {"history": ["item", "category", "action"], "candidates": ["item", "category"]},
    "limits": {"history": 16, "candidates": 16},
    "workload": {"history": 8, "candidates": 8},
}


def write_toml(path):
    lines = ['name = "small"']
    for section in ("network", "vocabularies", "fields", "limits", "workload"):
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in TABLE[section].items())]
    path.write_text("\n".join(lines))


def test_a_study_compares_every_scheme_and_reuses_complete_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_toml(tmp_path / "small.toml")
    schema = parse_config(TABLE).schema
    shop, bounds = Shop(schema, categories=8), []
    for seed in (1, 2):
        rows = PlantedLog(shop, Habits(users=60, days=6), seed).draw_rows()
        write_log(f"log{seed}.parquet", {**rows.columns, TRUTH: rows.truth}, schema, truth=True)
        bounds.append(compute_best_auc(rows.truth))
    options = ["study", "--config", "small.toml", "--log", "log1.parquet", "log2.parquet", "--with-truth"]
    options += ["--out", "out", "--steps", "6", "--jobs", "2", "--validation", "0.2", "--test", "0.2"]
    assert command.main(options) == 0
    first = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [row["way"] for row in first["runs"]] == [way for way in WAYS for _ in range(2)]
    best = [row["auc"] for row in first["runs"] if row["way"] == "bound"]
    assert best == pytest.approx(bounds, abs=0.06)
    assert all(row["auc"] < min(best) for row in first["runs"] if row["way"] != "bound")
    trained, served = (
        next(row for row in first["runs"] if row["way"] == way) for way in ("undirected", "undirected_served")
    )
    assert trained["log_loss"] != served["log_loss"], "another mask gives other scores"
    table = (tmp_path / "out" / "study.md").read_text()
    assert table in capsys.readouterr().out
    assert len(re.findall(r"\| 0\.\d{4} ± 0\.\d{4} \| 0\.\d{4} ± 0\.\d{4} \|", table)) == len(WAYS)
    assert (tmp_path / "out" / "study.png").stat().st_size > 10_000

    assert command.main([*options, "--jobs", "1"]) == 0
    again = json.loads((tmp_path / "out" / "study.json").read_text())
    assert again["runs"] == first["runs"], "complete runs are read, times included"


def test_intervals_are_students_t():
    assert find_interval([1.0, 2.0, 3.0]) == {
        "mean": 2.0,
        "low": pytest.approx(2 - 2.484, abs=1e-3),  # t = 4.303 for two degrees of freedom; 1 / √3
        "high": pytest.approx(2 + 2.484, abs=1e-3),
    }
    assert find_interval([1.0]) == {"mean": 1.0, "low": None, "high": None}


def test_differences_are_taken_within_a_run():
    """Runs differ by more than ways do; a difference within a run does not see that."""

    def row(way, log, auc):
        return {"way": way, "log": log, "seed": 0, "auc": auc, "ndcg_at_10": auc, "log_loss": 1 - auc}

    levels = {"no_history": 0.0, "target_blind": 0.2, "undirected": 0.21, "undirected_served": 0.15}
    rows = [row(way, log, level + auc) for way, level in levels.items() for log, auc in (("a", 0.5), ("b", 0.7))]
    found = {(each["of"], each["over"]): each["auc"] for each in summarise(rows)["differences"]}
    cost = found["target_blind", "undirected"]
    assert (cost["low"], cost["mean"], cost["high"]) == pytest.approx((-0.01, -0.01, -0.01))
    assert found["undirected_served", "undirected"]["mean"] == pytest.approx(-0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--log", "a/x.parquet", "b/x.parquet"], "expected files of different names, got x, x"),
        (["--log", "x.parquet", "--jobs", "0"], "expected at least 1, got 1 and 0"),
        (["--log", "x.parquet", "--out", "nowhere/out"], "the folder nowhere does not exist"),
    ],
)
def test_invalid_study_options_are_reported(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert command.main(["study", "--config", "tiny", "--out", "out", *options]) == 1
    assert message in capsys.readouterr().err
