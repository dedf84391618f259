"""Learning curves of a training run, drawn from Lightning's metrics.csv."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from routing.predictor_file.format import HEADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"this": "#3b6ea5", "next": "#d9822b", "horizon": "#4f8a5b", "far": "#7a5fb0"}
LABELS = {
    "this": "this token",
    "next": "next token",
    "horizon": "next H tokens",
    "far": "next 4 H tokens",
}
SCORES = {"this": "recall", "next": "recall", "horizon": "precision", "far": "precision"}
"""The score drawn for each head. A horizon uses more than K experts: recall@K says little there."""


def read_series(metrics_csv: Path, column: str) -> tuple[list[int], list[float]]:
    """The steps at which a column has a value, and the values."""
    with open(metrics_csv, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column)]
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def plot_curves(metrics_csv: Path, png: Path) -> None:
    """Draw loss (training and validation) and the score of each head over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for head in HEADS:
        _plot_loss(losses, metrics_csv, head)
        _plot_score(scores, metrics_csv, head)
    losses.set(ylabel="binary cross-entropy, nats a used expert", ylim=(0, None))
    losses.set_title("loss: training (faint) and validation", fontsize=10)
    scores.set(ylabel="recall@K (next H tokens: precision@K)", ylim=(0, 1))
    scores.set_title("validation documents: history known, unknown (dashed)", fontsize=10)
    for axes in (losses, scores):
        axes.set_xlabel("optimiser steps")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = losses.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(HEADS), frameon=False)
    figure.savefig(png, dpi=150)


def _plot_loss(axes: Axes, metrics_csv: Path, head: str) -> None:
    color = COLORS[head]
    axes.plot(*read_series(metrics_csv, f"train/{head}_loss"), color=color, alpha=0.3)
    validation = read_series(metrics_csv, f"val/{head}_loss")
    axes.plot(*validation, color=color, marker="o", markersize=4, label=LABELS[head])


def _plot_score(axes: Axes, metrics_csv: Path, head: str) -> None:
    for known, style in (("known", "-"), ("unknown", "--")):
        steps, values = read_series(metrics_csv, f"val/{head}_{known}_{SCORES[head]}")
        axes.plot(steps, values, color=COLORS[head], linestyle=style, marker="o", markersize=4)
