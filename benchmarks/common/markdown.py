"""Tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Sequence[str]


def table(head: Row, rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a table."""
    yield _line(head)
    yield f"|{' --- |' * len(head)}"
    yield from map(_line, rows)


def provenance(document: Mapping[str, Any]) -> list[str]:
    """The command and the machine that gave a file of results, with the best speed of its link."""
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    speeds = document["link_bytes_per_s"]
    link = "none" if speeds is None else f"{max(speeds.values()) / 1e9:.1f} GB/s"
    return [f"    {document['command']}", "", f"{machine}; link {link}."]


def percent(share: float) -> str:
    """A share in percent; a dash for NaN."""
    return "-" if math.isnan(share) else f"{share:.0%}"


def _line(row: Row) -> str:
    return f"| {' | '.join(row)} |"
