"""The one decision whether to prefetch: off, on, or found out by the clock.

Generated steps, served steps and prompts all ask `Prefetching`. Under "auto" a `PrefetchTrial` runs
steps with and without prefetching in turns; generating and serving have a trial each, since what
pays for one sequence need not pay for many.
"""

from __future__ import annotations

from runtime.cuda.options import AUTO
from runtime.cuda.trial import Trial

TURN = 32
"""Steps of one way in a row."""
NEEDED = 128
"""Steps of each way after which the faster one is kept."""
LEAST_GAIN = 0.005
"""What prefetching must save of a step's time to be kept."""
BEING_TRIED = "prefetching is being tried"


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
            return self._trials.setdefault(kind, PrefetchTrial()).next_way()
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


class PrefetchTrial(Trial[bool]):
    """Says for each step whether to prefetch."""

    def __init__(self) -> None:
        super().__init__((False, True), turn=TURN, needed=NEEDED, least_gain=LEAST_GAIN)

    @property
    def verdict(self) -> str:
        """For people, with the numbers."""
        if self.choice is None:
            return BEING_TRIED
        return (
            f"prefetching is {'on' if self.choice else 'off'}: {self.ms[True]:.2f} ms a step with "
            f"it, {self.ms[False]:.2f} ms without"
        )
