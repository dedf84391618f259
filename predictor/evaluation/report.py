"""Report of `predictor.evaluate`: the scores as JSON, as tables and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictor.evaluation.scoring import Score
from predictor.evaluation.settings import EvaluateSettings
from predictor.file.documents import ExportedPredictor
from routing.predictor_file.format import FAR, HEADS
from routing.topology import Stack

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = ("recall", "recall_1_5k", "precision", "calibration_error")
TITLES = {
    "this": "this token's experts",
    "next": "the next token's experts, its id unknown",
    "horizon": "experts used by the next {horizon} tokens",
    "far": "experts used by the next {far} tokens",
}
PANELS = (("this", "recall"), ("next", "recall"), ("horizon", "precision"))
"""Head and metric of each panel. A horizon uses more than K experts: its recall@K stays low."""
BASELINE_STYLES = (":", "-.", "--")
GREYS = ("#a0a0a0", "#7a7a7a", "#505050")
COLORS = ("#3b6ea5", "#d9822b", "#4f8a5b", "#a8477a", "#7a5fb0")


def to_json(
    settings: EvaluateSettings,
    results: Sequence[Score],
    predictors: Sequence[ExportedPredictor],
    num_tokens: int,
    horizon: int,
) -> dict[str, Any]:
    """All figures; null for a layer without a token."""
    return {
        "trace": str(settings.trace),
        "fit_trace": None if settings.fit_trace is None else str(settings.fit_trace),
        "tokens": num_tokens,
        "horizon": horizon,
        "files": [_file(predictor) for predictor in predictors],
        "predictors": [
            {
                "name": result.name,
                "history": result.history,
                "heads": {head: _head(result, head) for head in HEADS},
            }
            for result in results
        ],
    }


def _file(predictor: ExportedPredictor) -> dict[str, Any]:
    return {
        "path": str(predictor.path),
        "bytes": predictor.path.stat().st_size,
        "window": predictor.shape.window,
        "horizon": predictor.shape.horizon,
        "cache": predictor.needs_history,
        "step_seconds": predictor.step_seconds(),
    }


def _head(result: Score, head: str) -> dict[str, Any]:
    return {
        metric: {
            "mean": _finite(result.mean(head, metric)),
            "layers": [_finite(value) for value in result.heads[head][metric]],
        }
        for metric in METRICS
    }


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def print_report(report: dict[str, Any], results: Sequence[Score], stack: Stack) -> None:
    """Print a table for each head, the recall of each layer, and the cost of each file."""
    from rich.console import Console

    console = Console()
    console.print(f"{report['tokens']:,} held-out tokens of {report['trace']}, {stack}")
    for head in HEADS:
        title = TITLES[head].format(horizon=report["horizon"], far=FAR * report["horizon"])
        console.print(_head_table(title, head, results, stack))
    console.print(_layer_table(results, stack))
    if report["files"]:
        console.print(_file_table(report["files"]))


def _head_table(title: str, head: str, results: Sequence[Score], stack: Stack) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("predictor")
    table.add_column("history")
    top_k = stack.top_k
    for column in (
        f"recall@{top_k}",
        f"recall@{math.ceil(1.5 * top_k)}",
        f"precision@{top_k}",
        "calibration error",
    ):
        table.add_column(column, justify="right")
    for result in results:
        figures = (f"{result.mean(head, metric):.3f}" for metric in METRICS)
        table.add_row(result.name, result.history, *figures)
    return table


def _layer_table(results: Sequence[Score], stack: Stack) -> Any:
    from rich.table import Table

    table = Table(title=f"recall@{stack.top_k} of {TITLES['this']}, by layer", title_justify="left")
    table.add_column("layer", justify="right")
    for result in results:
        table.add_column(result.label, justify="right")
    for layer in range(stack.num_layers):
        figures = (f"{result.heads['this']['recall'][layer]:.3f}" for result in results)
        table.add_row(str(layer), *figures)
    return table


def _file_table(files: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="cost", title_justify="left")
    table.add_column("predictor")
    for column in ("MB", "window", "ms a step (batch 1, full window, 1 thread)"):
        table.add_column(column, justify="right")
    for file in files:
        table.add_row(
            Path(file["path"]).name,
            f"{file['bytes'] / 1e6:.1f}",
            str(file["window"]),
            f"{1e3 * file['step_seconds']:.2f}",
        )
    return table


def plot_layers(results: Sequence[Score], stack: Stack, horizon: int, png: Path) -> None:
    """Draw each predictor's figures over the layers: a panel for each head, one legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (head, metric) in zip(panels, PANELS, strict=True):
        _plot_panel(axes, results, head, metric)
        axes.set_title(TITLES[head].format(horizon=horizon, far=FAR * horizon), fontsize=10)
        axes.set(xlabel="MoE layer", ylabel=f"{metric}@{stack.top_k}", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(png, dpi=150)


def _plot_panel(axes: Axes, results: Sequence[Score], head: str, metric: str) -> None:
    """Files in colour (dashed where the history is unknown), baselines in grey."""
    files = list(dict.fromkeys(result.name for result in results if not result.is_baseline))
    baselines = [result.name for result in results if result.is_baseline]
    for result in results:
        values = result.heads[head][metric]
        if not result.is_baseline:
            color = COLORS[files.index(result.name) % len(COLORS)]
            style = "--" if result.history == "unknown" else "-"
            axes.plot(values, style, color=color, label=result.label, marker="o", markersize=3)
        else:
            rank = baselines.index(result.name)
            axes.plot(
                values, BASELINE_STYLES[rank], color=GREYS[rank], label=result.label, linewidth=1.5
            )
