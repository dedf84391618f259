"""Plots of prefill results: time over prompt length with its bounds, and the lanes of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.lanes.lanes import read_lanes
from benchmarks.lanes.plot import caption, plot_bounds, plot_lanes
from benchmarks.prefill.row import PrefillRow
from benchmarks.systems.row import read_row


def draw(result: dict[str, Any], folder: Path) -> None:
    """Draw all plots of a prefill result."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [read_row(values, PrefillRow) for values in result["rows"]]
    title, name = result["title"], f"{result['settings']['shape']}-prefill"
    plot_prefill(rows, title, folder / f"{name}.png")
    bounded = [
        (row.recording.removeprefix("expertflow "), row, row.milliseconds)
        for row in rows
        if row.of_bound and row.milliseconds
    ]
    if bounded:
        plot_bounds(bounded, title, folder / f"{name}-bounds.png")
    recordings = result.get("lanes", {})
    for row in rows:
        if row.recording in recordings:
            file = folder / f"{name}-lanes-{row.arm.name.replace(' ', '-')}-{row.prompt}.png"
            lanes = read_lanes(recordings[row.recording])
            about = caption(row.recording, row, row.milliseconds)
            plot_lanes(lanes, f"{title}\n{about}", row.least_ms, file)


def plot_prefill(rows: Sequence[PrefillRow], title: str, path: Path) -> None:
    """One line per arm; dashed, the larger of link and computation."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    good = [row for row in rows if row.milliseconds]
    for arm in dict.fromkeys(row.arm for row in good):
        line = [row for row in good if row.arm == arm]
        prompts = [row.prompt for row in line]
        (drawn,) = axes.plot(prompts, [r.milliseconds or 0 for r in line], "o-", label=arm.name)
        bounds = [max(row.link_ms or 0, row.compute_ms or 0) for row in line]
        if all(bounds):
            axes.plot(prompts, bounds, "--", color=drawn.get_color(), linewidth=1)
    axes.set(xlabel="prompt tokens", ylabel="ms to the first token")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.prompt for row in good}))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda milliseconds, _: f"{milliseconds:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{title}\ndashed: the larger of link and computation alone", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
