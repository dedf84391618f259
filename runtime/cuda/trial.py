"""A trial by the clock: steps run in one of several ways, in turns, and the fastest is kept.

Everything counts: kernels, link, wasted bytes, evictions. So a way that does not pay costs the
trial's few hundred steps at the worst.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

SETTLING = 4
"""Steps at the start of a turn that do not count: their caches are of the other way's making."""
AGAIN = 1 << 14
"""Steps after which the question is asked anew: texts and neighbours change."""

Way = TypeVar("Way", bound=Hashable)


class Trial(Generic[Way]):
    """Says for each step which way it goes, and finds out meanwhile.

    ways: the first is kept unless another saves `least_gain` of its time. turn: steps of one way in
    a row. needed: steps of each way that count.
    """

    def __init__(self, ways: Sequence[Way], *, turn: int, needed: int, least_gain: float) -> None:
        self._ways, self._turn, self._needed, self._least_gain = ways, turn, needed, least_gain
        self._num_launched = self._num_landed = self._streak = 0
        self._last = ways[0]
        self.ms: dict[Way, float] = {}
        """Milliseconds of a step, of each way that the last verdict compared."""
        self._begin()

    def _begin(self) -> None:
        self.choice: Way | None = self._ways[0] if len(self._ways) == 1 else None
        """The fastest way; None while it is being tried."""
        self._seconds: dict[Way, list[float]] = {way: [] for way in self._ways}

    def next_way(self) -> Way:
        """The way of the step that is launched next."""
        turn = self._num_launched // self._turn
        self._num_launched += 1
        return self._ways[turn % len(self._ways)] if self.choice is None else self.choice

    def add(self, way: Way, seconds: float) -> None:
        """Count a step that has ended."""
        self._streak = self._streak + 1 if way == self._last else 0
        self._last = way
        self._num_landed += 1
        if self._num_landed % AGAIN == 0:
            self._begin()
        if self.choice is None and self._streak >= SETTLING:
            self._seconds[way].append(seconds)
            if min(map(len, self._seconds.values())) >= self._needed:
                self._choose()

    def _choose(self) -> None:
        self.ms = {way: 1e3 * typical(seconds) for way, seconds in self._seconds.items()}
        fastest, first = min(self._ways, key=lambda way: self.ms[way]), self._ways[0]
        gains = self.ms[fastest] < (1 - self._least_gain) * self.ms[first]
        self.choice = fastest if gains else first


def typical(seconds: list[float]) -> float:
    """The mean without the slowest tenth, which is what else the machine did."""
    return statistics.fmean(sorted(seconds)[: -(-len(seconds) * 9 // 10)])
