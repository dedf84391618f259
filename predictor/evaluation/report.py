"""Report of `predictor.evaluate`: the scores as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from predictor.evaluation.scoring import Score, Scores
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
    scores: Scores,
    predictors: Sequence[ExportedPredictor],
    horizon: int,
) -> dict[str, Any]:
    """All figures; null for a layer without a token. By label, means over the layers."""
    return {
        "trace": str(settings.trace),
        "fit_trace": None if settings.fit_trace is None else str(settings.fit_trace),
        "tokens": sum(scores.tokens.values()),
        "labels": scores.tokens,
        "horizon": horizon,
        "files": [_file(predictor) for predictor in predictors],
        "predictors": [
            {
                "name": result.name,
                "history": result.history,
                "heads": {head: _head(result, head) for head in HEADS},
                "labels": {label: _label(result, label) for label in scores.tokens},
            }
            for result in scores.results
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


def _label(result: Score, label: str) -> dict[str, dict[str, float | None]]:
    return {
        head: {metric: _finite(result.mean(head, metric, label)) for metric in METRICS}
        for head in HEADS
    }


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


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
