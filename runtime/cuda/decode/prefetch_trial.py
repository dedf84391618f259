"""Whether prefetching pays here: steps with it and without it, in turns, by the clock."""

from __future__ import annotations

import statistics

TURN = 32
"""Steps of one way in a row."""
SETTLING = 4
"""Steps at the start of a turn that do not count: their caches are of the other way's making."""
NEEDED = 128
"""Steps of each way after which the faster one is kept."""
LEAST_GAIN = 0.005
"""What prefetching must save of a step's time to be kept."""
AGAIN = 1 << 14
"""Steps after which the question is asked anew: texts change."""


class PrefetchTrial:
    """Says for each step whether to prefetch, and finds out meanwhile.

    Everything counts: kernels, link, wasted bytes, evictions. So prefetching costs a trial's few
    hundred steps at the worst.
    """

    def __init__(self) -> None:
        self._num_launched, self._num_landed = 0, 0
        self._last, self._streak = False, 0
        self._ms: dict[bool, float] = {}
        self._begin()

    def _begin(self) -> None:
        self.choice: bool | None = None
        """What was found; None while it is being tried."""
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def prefetches(self) -> bool:
        """Whether the step that is launched next shall prefetch."""
        self._num_launched += 1
        if self.choice is not None:
            return self.choice
        return (self._num_launched - 1) // TURN % 2 == 1

    def add(self, prefetched: bool, seconds: float) -> None:
        """Book a step that has ended."""
        self._streak = self._streak + 1 if prefetched == self._last else 0
        self._last = prefetched
        self._num_landed += 1
        if self._num_landed % AGAIN == 0:
            self._begin()
        if self.choice is None and self._streak >= SETTLING:
            self._seconds[prefetched].append(seconds)
            if min(map(len, self._seconds.values())) >= NEEDED:
                self._ms = {way: 1e3 * typical(times) for way, times in self._seconds.items()}
                self.choice = self._ms[True] < (1 - LEAST_GAIN) * self._ms[False]

    @property
    def verdict(self) -> str:
        """For people, with the numbers."""
        if self.choice is None:
            return "prefetching is being tried"
        return (
            f"prefetching is {'on' if self.choice else 'off'}: {self._ms[True]:.2f} ms a step with "
            f"it, {self._ms[False]:.2f} ms without"
        )


def typical(seconds: list[float]) -> float:
    """The mean without the slowest tenth, which is what else the machine did."""
    return statistics.fmean(sorted(seconds)[: -(-len(seconds) * 9 // 10)])
