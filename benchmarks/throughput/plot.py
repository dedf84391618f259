"""A plot of throughput results: tok/s over the sequences of a step, and what bounds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.common.link import best
from benchmarks.throughput.arm import OWN, ThroughputArm, batch_of
from benchmarks.throughput.bounds import Machine, Step

BATCHES = [8 << doubling for doubling in range(8)]
WIDTH, HEIGHT = 3.9, 4.4
OWN_COLOR = "#1f5fa8"
LINES = {
    "link": ("#a23b3b", "--"),
    "memory": ("#2e8b57", "-."),
    "FLOPs": ("#7a7a7a", ":"),
}
MARKERS = {"transformers": ("s", "#b8860b"), "accelerate": ("^", "#6a4c93")}


def draw(result: dict[str, Any], folder: Path) -> None:
    """Draw a panel for each encoding and memory. Raises ValueError for a file without any arm."""
    rows = [(ThroughputArm.parse(row["arm"]), row) for row in result["rows"] if "error" not in row]
    own = [(arm, row) for arm, row in rows if arm.system == OWN]
    if not own:
        raise ValueError("no arm of the file has a result to draw")
    panels = list(dict.fromkeys((arm.encoding, arm.residency) for arm, _ in own))
    machine = Machine(
        best(result["link_bytes_per_s"]), result.get("memory_bytes_per_s"), result.get("flops")
    )
    figure = Figure((WIDTH * len(panels) + 0.6, HEIGHT), layout="constrained")
    figure.suptitle(result["title"])
    shown = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(shown, panels, strict=True):
        here = [row for arm, row in own if (arm.encoding, arm.residency) == panel]
        others = [(arm, row) for arm, row in rows if _panel_of(arm, panels) == panel]
        _draw_panel(axes, panel, here, others, machine)
    shown[0].set_ylabel("new tokens a second")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{result['settings']['shape']}-throughput.png", dpi=150)


def _panel_of(arm: ThroughputArm, panels: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The panel of another system's arm: that of its memory, else the first."""
    if arm.system == OWN:
        return None
    own = arm.encoding, arm.residency
    return own if own in panels else panels[0]


def _draw_panel(
    axes: Axes, panel: tuple[str, str], rows: Sequence[dict[str, Any]],
    others: Sequence[tuple[ThroughputArm, dict[str, Any]]], machine: Machine,
) -> None:  # fmt: skip
    for name, speeds in bounds(rows[-1], machine).items():
        color, style = LINES[name]
        axes.plot(BATCHES, speeds, style, color=color, linewidth=1.2, label=f"bound: {name}")
    points = sorted((batch_of(row), row["tokens_per_s"]) for row in rows)
    axes.plot(*zip(*points, strict=True), "o-", color=OWN_COLOR, label="ExpertFlow")
    for arm, row in others:
        marker, color = MARKERS[arm.system]
        label = f"{arm.system}, {'all resident' if arm.residency == '1.0' else arm.residency}"
        axes.plot([batch_of(row)], [row["tokens_per_s"]], marker, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(BATCHES[0] * 0.8, BATCHES[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(BATCHES))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_title(f"{panel[0]}, {rows[-1]['slots'] / rows[-1]['experts']:.0%} resident")
    axes.set_xlabel("sequences")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def bounds(row: dict[str, Any], machine: Machine) -> dict[str, list[float]]:
    """Highest tok/s over `BATCHES`, by what bounds them, with the slots of a row.

    A file of before bounds were kept has only the link's, for the bytes that crossed it.
    """
    if "step" in row:
        step = Step(**row["step"])
    else:
        step, machine = (
            Step(row["bytes"] / row["steps"], 0, 0, 0),
            Machine(machine.link, None, None),
        )
    found: dict[str, list[float]] = {}
    for name, batch, seconds in _seconds(step, machine):
        if seconds:
            found.setdefault(name, []).append(batch / seconds)
    return found


def _seconds(step: Step, machine: Machine) -> Iterator[tuple[str, int, float]]:
    for batch in BATCHES:
        for name, seconds in step.seconds(machine, batch).items():
            yield name, batch, seconds
