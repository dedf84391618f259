"""The figures drawn: hit rates over cache sizes, and by label at one size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cache.policies import FREE_RULES
from runtime.comparison.contenders import OPTIMUM
from runtime.comparison.figures import ALL, Figures, of_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FREE, BOUND = "#8c8c8c", "#4f8a5b"


def draw(figures: Sequence[Figures], path: Path, title: str) -> None:
    """Write the picture to `path`."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row.label for row in figures if row.label != ALL))
    by_label = len(labels) > 1
    width = 7.2 + (0.8 + 0.42 * len(labels) if by_label else 0)
    figure = Figure(figsize=(width, 5.2), layout="constrained")
    ratios = [6.4, max(width - 7.2, 1.0)] if by_label else [1.0]
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    colours = _colours([row.contender for row in of_size(figures, figures[0].residency)])
    _draw_sizes(axes[0], figures, colours)
    if by_label:
        sizes = sorted({row.residency for row in figures})
        _draw_labels(axes[1], figures, labels, sizes[len(sizes) // 2], colours)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def _colours(names: Sequence[str]) -> dict[str, object]:
    from matplotlib import colormaps

    others = [n for n in names if n not in FREE_RULES and not n.startswith(OPTIMUM)]
    palette = colormaps["tab20"]
    colours: dict[str, object] = {name: palette(i % 20) for i, name in enumerate(others)}
    return {name: colours.get(name, FREE if name in FREE_RULES else BOUND) for name in names}


def _draw_sizes(axes: Axes, figures: Sequence[Figures], colours: dict[str, object]) -> None:
    markers = "osv^<>DPX*"
    for number, (name, colour) in enumerate(colours.items()):
        rows = sorted(
            (row for row in figures if (row.contender, row.label) == (name, ALL)),
            key=lambda row: row.residency,
        )
        axes.plot(
            [row.residency for row in rows], [row.hit_rate for row in rows],
            color=colour, label=name, markersize=4, linewidth=1.2,
            marker=markers[number % len(markers)],
            linestyle="--" if name.startswith(OPTIMUM) else "-",
        )  # fmt: skip
    axes.set_xticks(sorted({row.residency for row in figures}))
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.set(xlabel="share of all experts resident", ylabel="hit rate")
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _draw_labels(
    axes: Axes,
    figures: Sequence[Figures],
    labels: Sequence[str],
    residency: float,
    colours: dict[str, object],
) -> None:
    for name, colour in colours.items():
        rates = [
            next((row.hit_rate for row in of_size(figures, residency, label)
                  if row.contender == name), float("nan"))
            for label in labels
        ]  # fmt: skip
        axes.plot(range(len(labels)), rates, "_", color=colour, markersize=9, markeredgewidth=2)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set(ylabel="hit rate")
    axes.set_title(f"by label, {100 * residency:.4g} % of all experts resident", fontsize=8)
    axes.grid(alpha=0.3, axis="y")
