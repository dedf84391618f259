"""The one decision whether to prefetch: off, on, or found out by the clock.

Generated steps, served steps and prompts all ask `Prefetching`. Under "auto" a `PrefetchTrial` runs
steps with and without prefetching in turns; generating and serving have a trial each, since what
pays for one sequence need not pay for many.
"""

from __future__ import annotations

import statistics

from runtime.cuda.options import AUTO

TURN = 32
"""Steps of one way in a row."""
SETTLING = 4
"""Steps at the start of a turn that do not count: their caches are of the other way's making."""
NEEDED = 128
"""Steps of each way after which the faster one is kept."""
LEAST_GAIN = 0.005
"""What prefetching must save of a step's time to be kept."""
BEING_TRIED = "prefetching is being tried"
AGAIN = 1 << 14
"""Steps after which the question is asked anew: texts change."""


GENERATING, SERVING = "generating", "serving"
"""The kinds of steps, each with a trial of its own."""


class Prefetching:
    """Whether to prefetch. asked: True, False or "auto"; all_fit: every expert has a slot."""

    def __init__(self, asked: bool | str, *, all_fit: bool) -> None:
        self._asked, self._all_fit = asked, all_fit
        self._trials: dict[str, PrefetchTrial] = {}

    @property
    def always(self) -> bool:
        """Whether every step prefetches."""
        return self._asked is True and not self._all_fit

    @property
    def in_prompts(self) -> bool:
        """Whether prompts send the next layer's likely experts ahead."""
        return self._asked is not False and not self._all_fit

    def in_next_step(self, kind: str) -> bool:
        """Whether the step of this kind that is launched next prefetches."""
        if self._asked == AUTO and not self._all_fit:
            return self._trials.setdefault(kind, PrefetchTrial()).prefetches()
        return self.always

    def count_step(self, kind: str, prefetched: bool, seconds: float) -> None:
        """Note how long a step of this kind took."""
        if kind in self._trials:
            self._trials[kind].add(prefetched, seconds)

    @property
    def verdict(self) -> str:
        """A sentence for people, with the times that decided it."""
        if self._asked is False:
            return "prefetching is off, as asked for"
        if self._all_fit:
            return "prefetching is off: every expert has a slot"
        if self._asked is True:
            return "prefetching is on, as asked for"
        generating, serving = self._trials.get(GENERATING), self._trials.get(SERVING)
        more = "" if serving is None else f"; while serving, {serving.verdict}"
        return (BEING_TRIED if generating is None else generating.verdict) + more


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
        """The faster way; None while it is being tried."""
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def prefetches(self) -> bool:
        """Whether the step that is launched next shall prefetch."""
        self._num_launched += 1
        if self.choice is not None:
            return self.choice
        return (self._num_launched - 1) // TURN % 2 == 1

    def add(self, prefetched: bool, seconds: float) -> None:
        """Count a step that has ended."""
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
            return BEING_TRIED
        return (
            f"prefetching is {'on' if self.choice else 'off'}: {self._ms[True]:.2f} ms a step with "
            f"it, {self._ms[False]:.2f} ms without"
        )


def typical(seconds: list[float]) -> float:
    """The mean without the slowest tenth, which is what else the machine did."""
    return statistics.fmean(sorted(seconds)[: -(-len(seconds) * 9 // 10)])
