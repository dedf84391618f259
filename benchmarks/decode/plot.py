"""Plots of decode results: speed over residency, bytes by policy, lanes of a step, bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.lanes.lanes import read_lanes
from benchmarks.lanes.plot import caption, plot_bounds, plot_lanes
from benchmarks.systems.row import Row, read_row

COLORS = {
    "lru": "#7a7a7a",
    "lfu": "#b8860b",
    "predicted": "#1f5fa8",
    "belady": "#2e8b57",
    "none": "#a23b3b",
}
BAR = 0.17
LABEL_RATIO = 1.3
"""Other systems of nearly the same speed share a label."""


def draw(result: dict[str, Any], folder: Path) -> None:
    """Draw all plots of a decode result: speed, bytes, bounds, and the lanes of recorded steps.

    Steps in a file of before there were lanes are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [read_row(values, Row) for values in result["rows"]]
    title, name = result["title"], result["settings"]["shape"]
    plot_speed(rows, title, folder / f"{name}-speed.png")
    plot_bytes(rows, title, folder / f"{name}-bytes.png")
    bounded = [
        (row.arm.name.removeprefix("expertflow "), row, row.step_ms)
        for row in rows
        if row.of_bound and row.step_ms
    ]
    if bounded:
        plot_bounds(bounded, title, folder / f"{name}-bounds.png")
    recorded = result.get("lanes", {})
    for row in rows:
        if row.arm.name in recorded:
            file = folder / f"{name}-lanes-{row.arm.name.replace(' ', '-')}.png"
            about = caption(f"a step of {row.arm.name}", row, row.step_ms)
            lanes = read_lanes(recorded[row.arm.name])
            plot_lanes(lanes, f"{title}\n{about}", row.least_ms, file)


def plot_speed(rows: Sequence[Row], title: str, path: Path) -> None:
    """Decoded tokens a second over the resident share; dashed, the bound of the link."""
    plain = [row for row in _plain(rows) if row.tokens_per_s]
    figure, axes = _figure(title, (7, 4.5))
    for policy in _policies(plain):
        line = sorted((_share(row), row) for row in plain if row.arm.policy == policy)
        color = COLORS[policy]
        shares = [share for share, _ in line]
        axes.plot(shares, [row.tokens_per_s or 0 for _, row in line], "o-", color=color,
                  label=f"ExpertFlow, {policy}")  # fmt: skip
        floor = [(share, 1e3 / row.floor_ms) for share, row in line if row.floor_ms and share < 1]
        if floor:
            axes.plot(*zip(*floor, strict=True), "_--", color=color, linewidth=1,
                      label=f"{policy}: the link alone")  # fmt: skip
    for row in _faster(rows):
        axes.plot([_share(row)], [row.tokens_per_s or 0], "^" if row.arm.prefetch else "s",
                  color=COLORS[_policy(row)], fillstyle="full" if row.arm.compile else "none",
                  label=_ways(row))  # fmt: skip
    _other_system_lines(axes, rows)
    axes.set(xlabel="share of the experts in GPU memory", ylabel="decoded tokens / s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({_share(row) for row in plain}))
    axes.xaxis.set_major_formatter(lambda share, _: _percent(share))
    axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _save(figure, path)


def plot_bytes(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bytes moved per decoded token, by policy and residency; wasted prefetches hatched."""
    plain = [row for row in _plain(rows) if row.bytes_per_token and _share(row) < 1]
    figure, axes = _figure(title, (7, 4))
    shares = sorted({_share(row) for row in plain}, reverse=True)
    for place, share in enumerate(shares):
        group = sorted(
            (row for row in plain if _share(row) == share),
            key=lambda row: _policies(plain).index(_policy(row)),
        )
        for index, row in enumerate(group):
            x = place + (index - (len(group) - 1) / 2) * BAR
            _bar(axes, x, row)
    for policy in _policies(plain):
        axes.bar([0], [0], color=COLORS[policy], label=policy)
    axes.set_xticks(range(len(shares)), [_percent(share) for share in shares])
    axes.set(xlabel="share of the experts in GPU memory", ylabel="MB moved / decoded token")
    _save(figure, path)


def _bar(axes: Axes, x: float, row: Row) -> None:
    axes.bar(x, (row.bytes_per_token or 0) / 1e6, BAR, color=COLORS[_policy(row)])
    if row.wasted_per_token:
        axes.bar(x, row.wasted_per_token / 1e6, BAR, fill=False, hatch="///")


def _plain(rows: Sequence[Row]) -> list[Row]:
    """ExpertFlow's arms at batch 1 without prefetching and compilation."""
    return [row for row in _singles(rows) if not (row.arm.prefetch or row.arm.compile)]


def _faster(rows: Sequence[Row]) -> list[Row]:
    """ExpertFlow's arms at batch 1 with prefetching as it is (no trial), compilation or both."""
    rows = [row for row in _singles(rows) if row.arm.prefetch in (False, True)]
    return [row for row in rows if row.arm.prefetch or row.arm.compile]


def _singles(rows: Sequence[Row]) -> list[Row]:
    single = (row for row in rows if row.arm.system == "expertflow" and row.arm.batch == 1)
    return [row for row in single if not row.error]


def _ways(row: Row) -> str:
    ways = [name for name in ("prefetch", "compile") if vars(row.arm)[name]]
    return f"ExpertFlow, {_policy(row)}, {' and '.join(ways)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _share(row: Row) -> float:
    return float(row.extra["resident_share"])


def _policy(row: Row) -> str:
    assert row.arm.policy is not None
    return row.arm.policy


def _policies(rows: Sequence[Row]) -> list[str]:
    used = {_policy(row) for row in rows}
    return [policy for policy in COLORS if policy in used]


def _other_system_lines(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw a line per system, with one label for those of nearly the same speed."""
    speeds = sorted(
        (row.tokens_per_s, row.arm.name)
        for row in rows
        if row.arm.system != "expertflow" and row.arm.batch == 1 and row.tokens_per_s
    )
    labels: list[tuple[float, list[str]]] = []
    for speed, name in speeds:
        axes.axhline(speed, color="black", linewidth=0.7, linestyle=":")
        if labels and speed < LABEL_RATIO * labels[-1][0]:
            labels[-1][1].append(name)
        else:
            labels.append((speed, [name]))
    for speed, names in labels:
        axes.annotate(
            ", ".join(names), (0.01, speed), xycoords=("axes fraction", "data"), fontsize=7,
            va="bottom",
        )  # fmt: skip


def _figure(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    if any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
