"""Room: pages of the key/value cache for the sequences in flight.

Each has pages for all its tokens before they run, and takes the next one as it grows. Where none is
free, full pages of those that decode go to host memory, if there is room. Admission counts that
room, and the next page for everyone in flight, so that hardly ever none is left: then the newest
sequence of the lowest priority is parked, and goes on, before others begin, once there is room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from runtime.serving.sequence import ServedSequence
from runtime.serving.steps.rows import Rows


class Room:
    """The pages of one serving loop; where rows have no pages, there is always room."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._displaced: set[ServedSequence] = set()
        self.num_displaced = 0
        """Times that a sequence was parked because no page was left."""

    def grow(self, active: Sequence[ServedSequence]) -> list[ServedSequence]:
        """Pages for all tokens of the sequences in flight; returns those to park for it."""
        parked: list[ServedSequence] = []
        for sequence in sorted(self._rows.pages.lacking(active), key=_rank):
            while sequence not in parked and not self._rows.grow(sequence):
                parked.append(max((one for one in active if one not in parked), key=_rank))
                self._rows.park(parked[-1])
        self._rows.pages.bring_back()
        self._displaced.update(parked)
        self.num_displaced += len(parked)
        return parked

    def first(self, waiting: Sequence[ServedSequence]) -> list[ServedSequence]:
        """Those that were parked for others, and go on before others of their priority begin."""
        if not self._displaced:
            return []
        self._displaced &= set(waiting)
        most = max((one.request.priority for one in waiting), default=0)
        parked = (one for one in self._displaced if one.request.priority == most)
        return sorted(parked, key=_rank)

    def most(self, waiting: Sequence[ServedSequence], active: Iterable[ServedSequence]) -> int:
        """The number of waiting sequences that there may be room for: of the shortest."""
        if not self._rows.pages.most(()):
            return len(waiting)
        left, count = self._left(active), 0
        for pages in sorted(map(self._rows.pages.ahead, waiting)):
            left -= pages
            if left < 0:
                break
            count += 1
        return count

    def fitting(
        self, active: Iterable[ServedSequence], chosen: Sequence[ServedSequence]
    ) -> list[ServedSequence]:
        """The first of the `chosen`, as many as there is room for: none overtakes a longer one."""
        left, fitting = self._left(active), list[ServedSequence]()
        for sequence in chosen:
            left -= self._rows.pages.ahead(sequence)
            if left < 0:
                break
            fitting.append(sequence)
        return fitting

    def _left(self, active: Iterable[ServedSequence]) -> int:
        """Pages that nobody in flight takes soon."""
        active = list(active)
        return self._rows.pages.most(active) - sum(map(self._rows.pages.ahead, active))


def _rank(sequence: ServedSequence) -> tuple[int, int]:
    """Lower for those that keep their pages longer."""
    return -sequence.request.priority, sequence.number
