"""Tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

Row = Sequence[str]


def table(head: Row, rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a table."""
    yield _line(head)
    yield f"|{' --- |' * len(head)}"
    yield from map(_line, rows)


def percent(share: float) -> str:
    """A share in percent; a dash for NaN."""
    return "-" if math.isnan(share) else f"{share:.0%}"


def _line(row: Row) -> str:
    return f"| {' | '.join(row)} |"
