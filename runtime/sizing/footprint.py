"""A footprint: the parts of fast memory that a model takes, and the experts that stay behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtime.sizing.memory_plan import MemoryPlan
from runtime.sizing.units import format_bytes

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 60
"""Characters of the longest bar."""
LOOKS = {
    "dense weights": ("█", "#3b6ea5"),
    "keys and values": ("▓", "#7a5fb0"),
    "slots for experts": ("▒", "#4f8a5b"),
    "workspaces": ("░", "#8c8c8c"),
    "not used": ("·", "#d5dae0"),
    "experts without a slot": ("▚", "#d9822b"),
    "copies of experts in slots": ("▞", "#e8b98a"),
    "dense weights, moved here": ("█", "#3b6ea5"),
    "spilled keys and values": ("▓", "#7a5fb0"),
}
"""Fill character and colour of each part."""


class Part(NamedTuple):
    """Bytes of one kind."""

    name: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Parts of the fast memory, and of what lies behind it."""

    fast: list[Part]
    behind: list[Part]
    on_gpu: bool

    @property
    def rows(self) -> dict[str, list[Part]]:
        """The parts by where they lie."""
        names = (
            ("GPU memory", "host memory") if self.on_gpu else ("memory", "files, read at a miss")
        )
        return dict(zip(names, (self.fast, self.behind), strict=True))


def footprint_of(
    plan: MemoryPlan,
    *,
    on_gpu: bool,
    cache: int | None,
    workspace: int = 0,
    budget: int | None = None,
) -> Footprint:
    """The parts of a plan. cache: bytes of keys and values; None where they are not known.

    workspace: bytes of activations and buffers. budget: the bytes that pay for all of it, if there
    are.
    """
    slots, stored = plan.slot_bytes, plan.total_stored_bytes
    resident_stored = round(stored * plan.fraction)
    fast = [
        Part("dense weights", plan.source.fixed_bytes - plan.moved_bytes),
        Part("keys and values", cache or 0),
        Part("slots for experts", slots),
        Part("workspaces", workspace),
    ]
    if budget is not None:
        fast.append(Part("not used", budget - sum(part.num_bytes for part in fast)))
    behind = [
        Part("experts without a slot", stored - resident_stored),
        Part("copies of experts in slots", resident_stored),
        Part("dense weights, moved here", plan.moved_bytes),
        Part("spilled keys and values", plan.spilled_bytes),
    ]
    return Footprint(
        fast=[part for part in fast if part.num_bytes > 0],
        behind=[part for part in behind if part.num_bytes > 0],
        on_gpu=on_gpu,
    )


def bars(footprint: Footprint) -> Text:
    """The parts as bars of characters, all to one scale. A part that is there has one at least."""
    from rich.text import Text

    text = Text()
    longest = max(total(parts) for parts in footprint.rows.values())
    for place, parts in footprint.rows.items():
        text.append(f"{place}: {format_bytes(total(parts))}\n")
        for part in parts:
            fill, color = LOOKS[part.name]
            text.append(fill * max(round(WIDTH * part.num_bytes / longest), 1), color)
        text.append("\n")
        for part in parts:
            fill, color = LOOKS[part.name]
            text.append("  ").append(fill, color)
            text.append(f" {part.name} {format_bytes(part.num_bytes)}")
        text.append("\n")
    return text


def total(parts: list[Part]) -> int:
    """Bytes of all parts."""
    return sum(part.num_bytes for part in parts)


def draw(footprint: Footprint, title: str, path: Path) -> None:
    """Draw the parts into the image file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.add_subplot()
    longest = max(total(parts) for parts in footprint.rows.values())
    unit, name = (2**30, "GiB") if longest >= 2**30 else (2**20, "MiB")
    for row, parts in enumerate(footprint.rows.values()):
        start = 0.0
        for part in parts:
            size = part.num_bytes / unit
            label = f"{part.name}: {format_bytes(part.num_bytes)}"
            axes.barh(row, size, left=start, color=LOOKS[part.name][1], label=label, height=0.55)
            start += size
    axes.set_yticks(range(len(footprint.rows)), list(footprint.rows))
    axes.invert_yaxis()
    axes.set(xlabel=name, xlim=(0, 1.02 * longest / unit))
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, facecolor="white")
