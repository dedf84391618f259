"""Hits, misses and bytes that an engine counted up to a moment."""

from __future__ import annotations

from typing import Any, NamedTuple


class Counts(NamedTuple):
    """An engine's counters."""

    hits: int
    misses: int
    bytes_loaded: int
    """Bytes of missing experts."""
    bytes_prefetched: int
    bytes_wasted: int
    """Bytes prefetched and then not needed."""

    @property
    def bytes_moved(self) -> int:
        """Bytes to the device, loaded or prefetched."""
        return self.bytes_loaded + self.bytes_prefetched

    @property
    def bytes_needed(self) -> int:
        """Bytes moved, less those wasted."""
        return self.bytes_moved - self.bytes_wasted

    def minus(self, before: Counts) -> Counts:
        """The counts since `before`."""
        return Counts(*(a - b for a, b in zip(self, before, strict=True)))

    def plus(self, other: Counts) -> Counts:
        """The sum of both."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Counts(0, 0, 0, 0, 0)


def read_counts(stats: Any) -> Counts:
    """The counters of an engine's `Stats` as they are now."""
    return Counts(
        stats.hits,
        stats.misses + int(stats.late_L.sum()),
        stats.bytes_loaded - stats.bytes_prefetched,
        stats.bytes_prefetched,
        stats.bytes_wasted,
    )
