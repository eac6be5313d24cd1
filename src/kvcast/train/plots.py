"""Plots: loss and metrics of a run, and the results of a study."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.use("agg")

GREEN, RED, BLUE, GREY, AMBER = "#0b6e4f", "#b23a48", "#3d5a80", "#8d99ae", "#e09f3e"
# The ways of a study that are trained.
WAY_COLOURS = {"no_history": AMBER, "target_blind": GREEN, "undirected": RED}


def draw_run(rows: list[dict[str, Any]], title: str, regime: str, path: Path) -> None:
    """Draw the rows of a metrics file into a PNG; `regime` says how it was trained."""
    evaluations = [row for row in rows if "validation" in row]
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    losses, rankings = figure.subplots(2, 1, sharex=True)
    draw_losses(losses, evaluations)
    draw_rankings(rankings, evaluations, rows[-1])
    rankings.set_xlabel("step")
    save(figure, title, regime, path)


def draw_losses(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    """Draw losses and learning rate: does it learn, and does it overfit?"""
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
    """Draw ranking metrics of the validation part, beside popularity."""
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
            f"saved: {place[1]:.4f}", place, textcoords="offset points", xytext=(0, -18), ha="center", color=GREEN
        )
    if "popularity_validation" in last:
        popularity = last["popularity_validation"]["auc"]
        axes.axhline(popularity, color=RED, linestyle="--", label=f"AUC of popularity alone: {popularity:.4f}")
    axes.set_ylabel("validation")
    axes.margins(y=0.18)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def save(figure: Figure, title: str, regime: str, path: Path) -> None:
    """Write a figure, with a title and how it was measured."""
    for axes in figure.axes[:2]:  # the third of a run shares a frame with the first
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.supxlabel(regime, fontsize=8, color="#555555")
    figure.savefig(path, dpi=130)


def draw_study(result: dict[str, Any], names: Mapping[str, str], path: Path) -> None:
    """Draw the result of `run_study` into a PNG: the AUC of each way, and the learning curves; `names` are labels."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    reached, learned = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_reached(reached, result, names)
    draw_learned(learned, result, names)
    runs = len([row for row in result["runs"] if row["way"] == "target_blind"])
    regime = (
        f"{runs} runs of {result['steps']} steps of {result['batch_size']} requests, learning rate "
        f"{result['learning_rate']:g}; bars: 95% intervals of the mean"
    )
    save(figure, f"{result['config']}: what the mask costs", regime, path)


def draw_reached(axes: Axes, result: dict[str, Any], names: Mapping[str, str]) -> None:
    """Draw the AUC of each way, with its interval."""
    ways = list(result["ways"])
    for place, way in enumerate(ways[::-1]):
        found = result["ways"][way]["auc"]
        half = 0 if found["high"] is None else found["high"] - found["mean"]
        colour = WAY_COLOURS.get(way, GREY)
        axes.errorbar(found["mean"], place, xerr=half, fmt="o", color=colour, capsize=4, markersize=7)
        axes.annotate(
            f"{found['mean']:.4f}", (found["mean"], place), textcoords="offset points", xytext=(0, 8), ha="center"
        )
    axes.set_yticks(range(len(ways)), [names[way] for way in ways[::-1]])
    axes.set_ylim(-0.5, len(ways) - 0.2)
    axes.margins(x=0.12)
    axes.set_xlabel("AUC on the test part")


def draw_learned(axes: Axes, result: dict[str, Any], names: Mapping[str, str]) -> None:
    """Draw learning curves: the mean of the runs, and their range."""
    for way, colour in WAY_COLOURS.items():
        curves = [row["validation_auc"] for row in result["runs"] if row["way"] == way]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]]
        values = list(zip(*([auc for _, auc in curve] for curve in curves), strict=True))  # a tuple of runs a step
        means = [sum(each) / len(each) for each in values]
        axes.plot(steps, means, color=colour, linewidth=2, label=names[way])
        axes.fill_between(
            steps, [min(each) for each in values], [max(each) for each in values], color=colour, alpha=0.2
        )
    axes.set_xlabel("step")
    axes.set_ylabel("AUC on the validation part")
    axes.legend(frameon=False, fontsize=8)
