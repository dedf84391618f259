"""Order by predicted route: the fewest expected expert loads.

The expected loads of a step are the sum over all experts that are not resident of the probability
that any of its sequences uses them, 1 - product of (1 - p). Choosing the best group is a weighted
coverage problem; the greedy choice, one sequence at a time by what it adds, costs one matrix-vector
product each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from runtime.serving.scheduling.bursts import Bursts
from runtime.serving.scheduling.ordering import Fifo, Ordering
from runtime.serving.scheduling.payoff import Payoff, expected_loads
from runtime.serving.sequence import ServedSequence

MOST_USED = 0.95
"""Share of all experts that a chosen group still uses, above which choosing did not pay."""


class Predicted(Ordering):
    """Least expected loads; first come, first served, and no look at prompts, while that rests.

    Admission groups requests by the mean use of each expert over the prompt; a step is composed by
    what the pending tokens use. Prompts are admitted in bursts, of `burst` where so many wait:
    nearly every expert crosses the link for a step with prompts in it, so several share one.
    Ordering rests at once after a group that uses nearly all experts, however well chosen.
    """

    name = "predicted"
    needs_forecasts = True

    def __init__(
        self, seconds_per_load: Callable[[], float], *, burst: int, batch: int,
        most_used: float = MOST_USED,
    ) -> None:  # fmt: skip
        """most_used: share of the experts that a group uses, above which ordering rests."""
        self._most_used = most_used
        self.payoff = Payoff(seconds_per_load)
        self.bursts = Bursts(burst, batch, seconds_per_load)
        self._fifo = Fifo()

    @property
    def looks_ahead(self) -> bool:
        return not (self.payoff.resting or self.bursts.payoff.resting)

    def observe(self, num_sequences: int, seconds: float) -> None:
        self.bursts.times.add(num_sequences, seconds)

    def holds_back(self, num_waiting: int, num_free: int, num_active: int) -> bool:
        if self.payoff.resting:
            return False
        return self.bursts.holds_back(num_waiting, num_free, num_active)

    def admit(
        self,
        waiting: Sequence[ServedSequence],
        active: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        if not self.looks_ahead or any(sequence.forecast is None for sequence in waiting):
            return list(waiting[:count])
        admitted = self._choose(waiting, active, count, missing_K)
        left_K = missing_K * np.prod(
            [_pending(sequence) for sequence in active if sequence.is_ready], axis=0
        )
        self.bursts.count(np.stack([_pending(sequence) for sequence in admitted]), left_K)
        return admitted

    def _choose(
        self,
        waiting: Sequence[ServedSequence],
        active: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        if len(waiting) <= count:
            return list(waiting)
        chosen = [] if active else [waiting[0]]
        others = [sequence for sequence in waiting if sequence not in chosen]
        unused_NK = np.stack([1 - _habit(sequence) for sequence in others])
        left_K = missing_K * np.prod(
            [1 - _habit(sequence) for sequence in (*active, *chosen)], axis=0
        )
        picks = cheapest(unused_NK, left_K, count - len(chosen))
        return [*chosen, *(others[i] for i in picks)]

    def compose(
        self,
        ready: Sequence[ServedSequence],
        chosen: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        oldest = self._fifo.compose(ready, chosen, count, missing_K)
        if len(ready) <= count or self.payoff.rests():
            return oldest
        start = time.perf_counter()
        unused_NK = np.stack([_pending(sequence) for sequence in ready])
        base_K = missing_K * np.prod([_pending(sequence) for sequence in chosen], axis=0)
        picks = cheapest(unused_NK, base_K, count)
        saved = expected_loads(unused_NK[:count], base_K) - expected_loads(unused_NK[picks], base_K)
        if 1 - unused_NK[picks].prod(0).mean() > self._most_used:
            self.payoff.rest()
        else:
            self.payoff.add(saved, time.perf_counter() - start)
        return [ready[i] for i in picks]


def cheapest(unused_NK: np.ndarray, weight_K: np.ndarray, count: int) -> list[int]:
    """Greedily the `count` rows that use the least of `weight_K`, counting shared uses once.

    unused_NK: float32, probability that row n does not use expert k.
    """
    used_NK, left_K = 1 - unused_NK, weight_K.copy()
    taken = np.zeros(len(unused_NK), np.float32)
    chosen: list[int] = []
    for _ in range(min(count, len(unused_NK))):
        best = int((used_NK @ left_K + taken).argmin())
        chosen.append(best)
        taken[best] = np.inf
        left_K *= unused_NK[best]
    return chosen


def _habit(sequence: ServedSequence) -> np.ndarray:
    assert sequence.forecast is not None
    return sequence.forecast.mean_use_LE.reshape(-1).astype(np.float32, copy=False)


def _pending(sequence: ServedSequence) -> np.ndarray:
    assert sequence.forecast is not None
    return sequence.forecast.unused_LE.reshape(-1).astype(np.float32, copy=False)
