"""Tables of lanes and bounds: printed, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common.markdown import table
from benchmarks.common.report import number, print_table
from benchmarks.lanes.kinds import GPU, LINK
from benchmarks.systems.row import ArmRow

Document = dict[str, Any]


def lanes(document: Document) -> Iterator[str]:
    """Of every arm that was recorded: the time in which each lane worked, its bound, and the share
    of the bound that it reached.
    """
    head, cells = _figures(document["rows"])
    return table(head, cells)


def print_lanes(rows: Sequence[ArmRow], title: str) -> None:
    """Print the same table; nothing where nothing was recorded."""
    head, cells = _figures([row.to_json() for row in rows])
    if cells:
        print_table(f"{title}: lanes and bounds", head, cells, {})


def _figures(rows: Sequence[Document]) -> tuple[list[str], list[list[str]]]:
    recorded = [row for row in rows if row.get("recorded_ms")]
    known = dict.fromkeys(name for row in recorded for name in row["busy_ms"])
    busy = sorted(known, key=lambda name: (name == GPU) - (name == LINK))
    head = ["arm", "recorded, ms", *(f"{name} works" for name in busy), "bound, ms", "reached"]
    return head, [_cells(row, busy) for row in recorded]


def _cells(row: Document, busy: Sequence[str]) -> list[str]:
    name = f"{row['name']}, {row['prompt']} tokens" if "prompt" in row else row["name"]
    return [
        name,
        number(row["recorded_ms"], ".2f"),
        *(number(row["busy_ms"].get(one), ".2f") for one in busy),
        _bound(row["least_ms"]),
        "-" if row["of_bound"] is None else f"{row['of_bound']:.0%}",
    ]


def _bound(least_ms: dict[str, float]) -> str:
    """The largest of the lanes' least times, and whose it is."""
    if not least_ms:
        return "-"
    lane, bound = max(least_ms.items(), key=lambda item: item[1])
    return f"{bound:.2f} {lane}"
