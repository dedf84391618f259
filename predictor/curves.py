"""Learning curves of a training run, drawn from Lightning's metrics.csv."""

import csv
from pathlib import Path

from predictor.interface import HEADS

COLORS = {"this": "#3b6ea5", "next": "#d9822b", "horizon": "#4f8a5b"}


def read_series(metrics_csv: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column, where it has a value."""
    with open(metrics_csv, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column)]
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def plot_curves(metrics_csv: Path, png: Path) -> None:
    """Draw loss (training and validation) and recall of each head over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, recalls = figure.subplots(1, 2)
    for head in HEADS:
        color = COLORS[head]
        losses.plot(*read_series(metrics_csv, f"train/{head}_loss"), color=color, alpha=0.35)
        validation = read_series(metrics_csv, f"val/{head}_loss_epoch")
        if not validation[0]:
            validation = read_series(metrics_csv, f"val/{head}_loss")
        losses.plot(*validation, color=color, marker="o", label=head)
        for known, style in (("known", "-"), ("unknown", "--")):
            series = read_series(metrics_csv, f"val/{head}_{known}_recall")
            label = f"{head}, history {known}"
            recalls.plot(*series, color=color, linestyle=style, marker="o", label=label)
    losses.set(xlabel="step", ylabel="binary cross-entropy", yscale="log")
    losses.set_title("loss: training (faint), validation (dots)", fontsize=9)
    recalls.set(xlabel="step", ylabel="recall@K", ylim=(0, 1))
    recalls.set_title("recall on validation documents", fontsize=9)
    for axes in (losses, recalls):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(png, dpi=150)
