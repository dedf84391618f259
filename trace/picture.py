"""Picture of expert usage: a heat map of all text, and one of every domain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trace.usage import Usage, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 24
COLUMNS = 4
OCTAVES = 3
"""Domain panels saturate at 2 ** OCTAVES times the average use, and at its reciprocal."""


def draw_usage(usage: Usage, path: Path, *, title: str) -> None:
    """Write the picture in the format of `path`'s suffix.

    Above: the use of each expert over an even share. Below, for each of the largest labels: its use
    of each expert over that of the whole trace. Every panel has the experts in the same order, that
    of the label that favours them.
    """
    from matplotlib.figure import Figure

    largest = np.argsort(-usage.tokens_D, kind="stable")[:MAX_PANELS]
    shown = sorted(int(label) for label in largest) if len(usage.labels) > 1 else []
    ratio_DLE = _ratios(usage)[shown]
    order_LE = _order(ratio_DLE) if shown else np.argsort(-usage.counts_LE, axis=-1)
    heights = [3.2] + [0.6 + 1.5 * -(-len(shown) // COLUMNS)] * bool(shown)
    figure = Figure(figsize=(13, 0.4 + sum(heights)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_whole(parts[0], usage, order_LE, by_label=bool(shown))
    if shown:
        names = [f"{usage.labels[label]}  ({usage.tokens_D[label]:,} tokens)" for label in shown]
        _draw_labels(parts[1], names, np.take_along_axis(ratio_DLE, order_LE[None], -1))
    figure.savefig(path, dpi=130, facecolor="white")


def _ratios(usage: Usage) -> np.ndarray:
    """log2 of an expert's share in each label over its share in the trace; 0 if it is not used."""
    whole_LE = shares(usage.counts_LE)
    half = 0.5 / np.maximum(usage.counts_DLE.sum(-1, keepdims=True), 1)  # half a use, against log 0
    log_DLE: np.ndarray = np.log2((shares(usage.counts_DLE) + half) / (whole_LE + half))
    return np.where(whole_LE > 0, log_DLE, 0)


def _order(ratio_DLE: np.ndarray) -> np.ndarray:
    """Experts of each layer by the label that favours them most, then by how much."""
    favourite_LE = ratio_DLE.argmax(0)
    return np.lexsort((-ratio_DLE.max(0), favourite_LE), axis=-1)


def _draw_whole(figure: Figure, usage: Usage, order_LE: np.ndarray, *, by_label: bool) -> None:
    axes = figure.subplots()
    even_LE = shares(usage.counts_LE) * usage.stack.num_experts
    image = axes.imshow(
        np.take_along_axis(even_LE, order_LE, -1),
        aspect="auto",
        cmap="magma",
        vmin=0,
        vmax=np.quantile(even_LE, 0.995),
    )
    axes.set_title(f"All {usage.num_tokens:,} tokens", loc="left", fontsize=10)
    order = "the domain that favours them most" if by_label else "how often they are used"
    axes.set_xlabel(f"{usage.stack.num_experts} experts of each layer, sorted by {order}")
    _label_layers(axes)
    figure.colorbar(image, ax=axes, pad=0.01, extend="max", label="use / even share")


def _draw_labels(figure: Figure, names: list[str], ratio_DLE: np.ndarray) -> None:
    """One panel a label, with the experts in the order of the panel above."""
    columns = min(len(names), COLUMNS)
    rows = -(-len(names) // columns)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name, ratio_LE in zip(panels, names, ratio_DLE, strict=False):
        image = axes.imshow(ratio_LE, aspect="auto", cmap="RdBu_r", vmin=-OCTAVES, vmax=OCTAVES)
        axes.set_title(name, loc="left", fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    _label_layers(panels[0])
    ticks = range(-OCTAVES, OCTAVES + 1)
    bar = figure.colorbar(image, ax=list(panels), pad=0.01, extend="both", aspect=14 * rows)
    bar.set_ticks(list(ticks), labels=[f"{2**t}×" if t >= 0 else f"1/{2**-t}" for t in ticks])
    bar.set_label("use here / use in all")


def _label_layers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel("MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xticks([])  # a place is no expert's number
