"""Pages of the sequences that have a row: how many each needs, and which give way to which.

Where no page of the device is free, full pages of the sequences that decode go to host memory, the
oldest of the row that has most. They are read in every step wherever they lie, but for the oldest
ones under a window; so it does not matter much which go. They come back when pages are free that
nobody takes soon.
"""

from __future__ import annotations

from collections.abc import Iterable

from runtime.kv.row_cache import RowCache
from runtime.serving.sequence import ServedSequence

SOON = 16
"""Steps in which a page that has come back shall not have to give way again: coming back takes as
long as being read in one step where it is."""


class RowPages:
    """The pages of the sequences in flight; where rows lie in one piece, nobody needs any."""

    def __init__(self, cache: RowCache) -> None:
        self._table = cache.pages
        self.in_flight: dict[int, ServedSequence] = {}
        """By the row that each has."""

    def ahead(self, sequence: ServedSequence) -> int:
        """Pages of its tokens, and the one that it takes next, if it may grow so long."""
        if self._table is None:
            return 0
        tokens = min(len(sequence.token_ids) + self._table.page, sequence.limit)
        return self._table.count(tokens)

    def most(self, active: Iterable[ServedSequence]) -> int:
        """Pages that there are for these and others: all of the device, and of host memory as many
        as can be sent there. 0 where rows have no pages.
        """
        if self._table is None:
            return 0
        full = sum(map(self._num_full, active))
        return self._table.num_pages + min(self._table.num_host_pages, full)

    def _num_full(self, sequence: ServedSequence) -> int:
        """Its first pages, which nothing is written to any more."""
        assert self._table is not None
        return sequence.num_cached // self._table.page if sequence.is_ready else 0

    def lacking(self, sequences: Iterable[ServedSequence]) -> list[ServedSequence]:
        """Those whose rows have no pages for all their tokens yet."""
        if (table := self._table) is None:
            return []
        return [
            one for one in sequences if one.row >= 0 and table.lacks(one.row, len(one.token_ids))
        ]

    def missing(self, sequence: ServedSequence) -> int:
        """Free pages of the device that its row lacks for all its tokens."""
        if self._table is None or sequence.row < 0:
            return 0
        held = len(self._table.of(sequence.row))
        needed = self._table.count(len(sequence.token_ids)) - held
        return max(0, needed - self._table.num_free)

    def grow(self, sequence: ServedSequence) -> bool:
        """Whether its row has pages for all its tokens now; full pages of others, or of its own,
        may go to host memory for it.
        """
        if self._table is None or sequence.row < 0:
            return True
        if missing := self.missing(sequence):
            full = {row: self._num_full(one) for row, one in self.in_flight.items()}
            others = len(self.in_flight) // self._table.page  # that take their next one in a step
            if not self._table.spill(missing + others, full) and not self._table.spill(
                missing, full
            ):
                return False
        return self._table.grow(sequence.row, len(sequence.token_ids))

    def bring_back(self) -> None:
        """Let the newest pages in host memory come back, of the rows that have most of them there,
        to pages of the device that nobody takes within `SOON` steps.
        """
        if self._table is None or not self._table.num_spilled:
            return
        away = {row: len(self._table.spilled_of(row)) for row in self.in_flight}
        for _ in range(self._table.num_free - SOON * len(away) // self._table.page):
            row = max(away, key=lambda one: away[one], default=-1)
            if row < 0 or not self._table.bring_back(row):
                break
            away[row] -= 1
