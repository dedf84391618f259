"""Pictures of a decode benchmark: speed over residency, bytes by policy, one step in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.arms import Row
from benchmarks.timeline import KINDS, OTHER, GpuEvent

COLORS = {
    "lru": "#7a7a7a",
    "lfu": "#b8860b",
    "predicted": "#1f5fa8",
    "belady": "#2e8b57",
    "none": "#a23b3b",
}
BAR = 0.17
KIND_COLORS = dict(
    zip([*KINDS, OTHER], ["#d9822b", "#8b5fbf", "#1f5fa8", "#2e8b57", "#c0587e", "#b0b0b0"],
        strict=True)
)  # fmt: skip


def plot_speed(rows: Sequence[Row], title: str, path: Path) -> None:
    """Decode tokens a second over the resident share, each policy's link floor dashed."""
    ours = [row for row in _plain(rows) if row.tokens_per_s]
    figure, axes = _figure(title, (7, 4.5))
    for policy in _policies(ours):
        line = sorted((_share(row), row) for row in ours if row.arm.policy == policy)
        color = COLORS[policy]
        shares = [share for share, _ in line]
        axes.plot(shares, [row.tokens_per_s or 0 for _, row in line], "o-", color=color,
                  label=policy)  # fmt: skip
        floor = [(share, 1e3 / row.floor_ms) for share, row in line if row.floor_ms]
        if floor:
            axes.plot(*zip(*floor, strict=True), "_--", color=color, linewidth=1,
                      label=f"{policy}: the link alone")  # fmt: skip
    _rival_lines(axes, rows)
    axes.set(xlabel="share of the experts in GPU memory", ylabel="decoded tokens / s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({_share(row) for row in ours}))
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.3g}")
    axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _save(figure, path)


def plot_bytes(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bytes moved for a decoded token, by policy and residency; wasted prefetches hatched."""
    ours = [row for row in _plain(rows) if row.bytes_per_token and _share(row) < 1]
    figure, axes = _figure(title, (7, 4))
    shares = sorted({_share(row) for row in ours}, reverse=True)
    for place, share in enumerate(shares):
        group = sorted(
            (row for row in ours if _share(row) == share),
            key=lambda row: _policies(ours).index(_policy(row)),
        )
        for index, row in enumerate(group):
            x = place + (index - (len(group) - 1) / 2) * BAR
            _bar(axes, x, row)
    for policy in _policies(ours):
        axes.bar([0], [0], color=COLORS[policy], label=policy)
    axes.set_xticks(range(len(shares)), [f"{share:.3g}" for share in shares])
    axes.set(xlabel="share of the experts in GPU memory", ylabel="MB moved / decoded token")
    _save(figure, path)


def _bar(axes: Axes, x: float, row: Row) -> None:
    axes.bar(x, (row.bytes_per_token or 0) / 1e6, BAR, color=COLORS[_policy(row)])
    if row.wasted_per_token:
        axes.bar(x, row.wasted_per_token / 1e6, BAR, fill=False, hatch="///")


def plot_timeline(events: Sequence[GpuEvent], title: str, path: Path) -> None:
    """Kernels of one step, a line a stream, coloured by what they do."""
    streams = list(dict.fromkeys(event.stream for event in events))
    figure, axes = _figure(title, (12, 1.6 + 0.6 * len(streams)))
    for kind, color in KIND_COLORS.items():
        chosen = [event for event in events if event.kind == kind]
        for stream in {event.stream for event in chosen}:
            spans = [(e.start_us, e.duration_us) for e in chosen if e.stream == stream]
            axes.broken_barh(spans, (streams.index(stream) - 0.4, 0.8), color=color)
        if chosen:
            busy = sum(event.duration_us for event in chosen)
            axes.bar([0], [0], color=color, label=f"{kind} {busy:.0f} us")
    axes.set_yticks(range(len(streams)), [f"stream {stream}" for stream in streams])
    axes.set(xlabel="us since the step began")
    axes.set_ylim(-0.6, len(streams) - 0.4)
    _save(figure, path)


def _plain(rows: Sequence[Row]) -> list[Row]:
    """Our arms without what is compared elsewhere: batches, prefetch, compilation."""
    return [
        row
        for row in rows
        if row.arm.system == "expertflow"
        and row.arm.batch == 1
        and not (row.arm.prefetch or row.arm.compile or row.error)
    ]


def _share(row: Row) -> float:
    return float(row.extra["resident_share"])


def _policy(row: Row) -> str:
    assert row.arm.policy is not None
    return row.arm.policy


def _policies(rows: Sequence[Row]) -> list[str]:
    used = {_policy(row) for row in rows}
    return [policy for policy in COLORS if policy in used]


def _rival_lines(axes: Axes, rows: Sequence[Row]) -> None:
    rivals = [r for r in rows if r.arm.system != "expertflow" and r.arm.batch == 1]
    for row in rivals:
        if row.tokens_per_s:
            axes.axhline(row.tokens_per_s, color="black", linewidth=0.7, linestyle=":")
            axes.annotate(
                row.arm.name, (0.01, row.tokens_per_s), xycoords=("axes fraction", "data"),
                fontsize=7, va="bottom",
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
