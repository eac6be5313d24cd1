"""The plot of a run: how loss and metrics went, where the best weights were, and what knowing no user would give."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")

GREEN, RED, BLUE, GREY, AMBER = "#0b6e4f", "#b23a48", "#3d5a80", "#8d99ae", "#e09f3e"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a run's metrics."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_run(rows: list[dict[str, Any]], title: str, regime: str, path: Path) -> None:
    """Draw the rows of a metrics file into a PNG.

    Args:
        rows: one an evaluation, and at last one of the best weights, if the run came so far.
        title: what was trained.
        regime: how.
        path: the file to write.
    """
    evaluations = [row for row in rows if "validation" in row]
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    losses, rankings = figure.subplots(2, 1, sharex=True)
    draw_losses(losses, evaluations)
    draw_rankings(rankings, evaluations, rows[-1])
    for axes in (losses, rankings):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    rankings.set_xlabel("step")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    losses.set_title(regime, fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)


def draw_losses(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """Does it learn, and does it learn by heart?"""
    steps = [row["step"] for row in evaluations]
    axes.plot(steps, [row["train_loss"] for row in evaluations], color=BLUE, linewidth=2, label="training loss")
    held_out = [row["validation"]["log_loss"] for row in evaluations]
    axes.plot(steps, held_out, color=RED, linewidth=2, marker="o", markersize=4, label="validation log loss")
    axes.set_ylabel("loss")
    rates = axes.twinx()
    rates.plot(steps, [row["learning_rate"] for row in evaluations], ":", color=GREY, label="learning rate")
    rates.set_ylabel("learning rate", color=GREY)
    rates.set_ylim(bottom=0)
    rates.spines[["top"]].set_visible(False)
    lines = [*axes.get_lines(), *rates.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8)


def draw_rankings(axes: Axes, evaluations: list[dict[str, Any]], last: dict[str, Any]) -> None:
    """Does it rank?"""
    steps = [row["step"] for row in evaluations]
    for key, label, colour in (
        ("auc", "AUC", GREEN),
        ("request_auc", "AUC within requests", AMBER),
        ("ndcg_at_10", "NDCG@10", BLUE),
    ):
        values = [row["validation"][key] for row in evaluations]
        axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=4, label=label)
    best = [row for row in evaluations if row["is_best"]]
    if best:
        place = (best[-1]["step"], best[-1]["validation"]["auc"])
        axes.plot(*place, "o", color=GREEN, markersize=10, fillstyle="none")
        axes.annotate(
            f"kept: {place[1]:.4f}", place, textcoords="offset points", xytext=(0, -18), ha="center", color=GREEN
        )
    if "popularity_validation" in last:
        popularity = last["popularity_validation"]["auc"]
        axes.axhline(popularity, color=RED, linestyle="--", label=f"AUC of popularity alone: {popularity:.4f}")
    axes.set_ylabel("validation")
    axes.margins(y=0.18)
    axes.legend(frameon=False, fontsize=8, ncols=2)
