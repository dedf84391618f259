"""Pictures of lanes: one step over time, and the bounds of all arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from benchmarks.lanes.kinds import (
    COPIED,
    EXPERTS,
    FETCHED,
    HOST_WORK,
    MODEL,
    OTHER,
    PLAN,
    PREDICTION,
    PREFETCHED,
    WAITING,
    lane_of,
)
from benchmarks.lanes.lanes import Lanes
from benchmarks.lanes.spans import Span
from benchmarks.systems.row import ArmRow

COLORS = {
    FETCHED: "#d55e00",
    PREFETCHED: "#fdb863",
    COPIED: "#8c4a0c",
    HOST_WORK: "#009e73",
    PREDICTION: "#cc79a7",
    EXPERTS: "#0072b2",
    MODEL: "#56b4e9",
    PLAN: "#1a1a1a",
    OTHER: "#999999",
    WAITING: "#eef2f6",
}
"""Told apart by lightness within a lane, and by people who do not see all colours."""
UNNAMED = "#5d3a9b"
"""Of CPU times that have no colour of their own."""
LANE_COLORS = {"link": COLORS[FETCHED], "CPU": COLORS[HOST_WORK], "GPU": COLORS[EXPERTS]}
HATCH: dict[str, Any] = {"hatch": "////", "edgecolor": "#a9b8c6"}
WIDEST_TEXT = 0.04
"""Share of the time from which a span has room for its number."""
DPI = 150


def plot_lanes(lanes: Lanes, title: str, least_ms: Mapping[str, float], path: Path) -> None:
    """Draw one step: a row for the link, each thread of the CPU and the GPU.

    Numbers in the rows are milliseconds. least_ms: what each lane allows at least;
    the largest is drawn as a line. Empty where it is not known.
    """
    names = list(lanes.rows)
    figure = Figure(figsize=(12, 1.9 + 0.55 * len(names)), layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    busy = lanes.busy_ms()
    for place, name in enumerate(names):
        _row(axes, place, lanes.rows[name], lanes.us)
        share = 1e3 * busy[name] / lanes.us
        axes.annotate(
            f"{busy[name]:.2f} ms, {share:.0%}", (1.01, place),
            xycoords=("axes fraction", "data"), va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set(ylim=(len(names) - 0.4, -0.95 if least_ms else -0.5), xlim=(0, lanes.us / 1e3))
    axes.set_xlabel("ms (right: time in which each works, and its share)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    _bound(axes, least_ms, lanes.us / 1e3)
    _legend(figure, axes, lanes)
    figure.savefig(path, dpi=DPI)


def caption(what: str, row: ArmRow, ms: float | None) -> str:
    """A line on a recorded row. what: its name. ms: its time without the profiler."""
    parts = [f"{row.recorded_ms:.2f} ms recorded"] if row.recorded_ms else []
    parts += [f"{ms:.2f} ms without the profiler"] if ms else []
    parts += [f"{row.of_bound:.0%} of the bound reached"] if row.of_bound else []
    return f"{what}: {', '.join(parts)}"


def _row(axes: Axes, place: int, row: Sequence[Span], us: float) -> None:
    for kind in dict.fromkeys(span.kind for span in row):
        spans = [(span.start / 1e3, span.length / 1e3) for span in row if span.kind == kind]
        style = HATCH if kind == WAITING else {}
        axes.broken_barh(
            spans, (place - 0.36, 0.72), facecolor=_color(kind), linewidth=0, **style
        )  # fmt: skip
    for span in row:
        if span.length >= WIDEST_TEXT * us:
            axes.text(
                (span.start + span.length / 2) / 1e3, place, f"{span.length / 1e3:.2f}",
                ha="center", va="center", fontsize=8, color=_ink(_color(span.kind)),
            )  # fmt: skip


def _bound(axes: Axes, least_ms: Mapping[str, float], end: float) -> None:
    if not least_ms:
        return
    lane, bound = max(least_ms.items(), key=lambda item: item[1])
    if not 0 < bound <= end:
        return
    axes.axvline(bound, color="black", linewidth=1.2, linestyle="--", zorder=0)  # behind the rows
    is_late = bound > end / 2
    axes.annotate(
        f"bound {bound:.2f} ms: {lane}", (bound, -0.62), xytext=(-5 if is_late else 5, 0),
        textcoords="offset points", ha="right" if is_late else "left", va="center", fontsize=9,
    )  # fmt: skip


def _legend(figure: Figure, axes: Axes, lanes: Lanes) -> None:
    for kinds in lanes.busy_us.values():
        for kind, us in kinds.items():
            style = HATCH if kind == WAITING else {}
            label = f"{kind} {us / 1e3:.2f} ms" if us >= 10 else f"{kind} < 0.01 ms"
            axes.bar([0], [0], linewidth=0, facecolor=_color(kind), label=label, **style)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncol=5, fontsize=9, frameon=False)


def plot_bounds(rows: Sequence[tuple[str, ArmRow, float]], title: str, path: Path) -> None:
    """Draw what each lane allows at least beside the time, an arm after the other.

    rows: (label, row, milliseconds), of rows whose bound is known.
    """
    size = 9, 1.5 + 0.62 * max(len(rows), 1)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    for place, (_, row, ms) in enumerate(rows):
        for index, (lane, least) in enumerate(row.least_ms.items()):
            axes.barh(place + 0.24 * (index - 1), least, 0.22, color=LANE_COLORS[lane])
        axes.plot([ms, ms], [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes.annotate(
            f"{ms:.4g} ms, bound {max(row.least_ms.values()):.4g} ({row.of_bound:.0%})",
            (ms, place), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    for lane, color in LANE_COLORS.items():
        axes.bar([0], [0], color=color, label=f"{lane} at least")
    axes.plot([], [], color="black", linewidth=2, label="measured")
    longest = max((ms for _, _, ms in rows), default=1.0)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, 1.45 * longest), xlabel="ms")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.legend(loc="outside lower center", ncol=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def _label(name: str) -> str:
    """A row's name: its lane, and whose row of the CPU it is."""
    lane = lane_of(name)
    return name if name == lane else f"{lane}, {name}"


def _color(kind: str) -> str:
    return COLORS.get(kind, UNNAMED)


def _ink(color: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = to_rgb(color)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
