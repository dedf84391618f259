"""Spans of time, and rows of spans that do not overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """A stretch of time in microseconds, and what it was spent on."""

    start: float
    length: float
    kind: str

    @property
    def end(self) -> float:
        return self.start + self.length


def clipped(spans: Iterable[Span], start: float, end: float) -> list[Span]:
    """The parts of the spans between two moments, as seen from the first."""
    parts = []
    for span in spans:
        first, last = max(span.start, start), min(span.end, end)
        if last > first:
            parts.append(Span(first - start, last - first, span.kind))
    return parts


def apart(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, without overlap: what two of them claim is the earlier one's."""
    row: list[Span] = []
    for span in sorted(spans):
        start = max(span.start, row[-1].end) if row else span.start
        if span.end > start:
            row.append(Span(start, span.end - start, span.kind))
    return row


def without(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The parts of the spans during which none of the others lasts."""
    taken, parts = apart(others), []
    for span in spans:
        start = span.start
        for other in clipped(taken, span.start, span.end):
            until = span.start + other.start
            if until > start:
                parts.append(Span(start, until - start, span.kind))
            start = until + other.length
        if span.end > start:
            parts.append(Span(start, span.end - start, span.kind))
    return parts


def joined(row: Sequence[Span], gap: float) -> list[Span]:
    """A row without the gaps of at most `gap` between neighbours of one kind."""
    long: list[Span] = []
    for span in row:
        if long and long[-1].kind == span.kind and span.start - long[-1].end <= gap:
            span = Span(long[-1].start, span.end - long.pop().start, span.kind)
        long.append(span)
    return long


def by_kind(row: Iterable[Span]) -> dict[str, float]:
    """Microseconds of each kind, the kinds in order of their first span."""
    totals: dict[str, float] = {}
    for span in row:
        totals[span.kind] = totals.get(span.kind, 0.0) + span.length
    return totals
