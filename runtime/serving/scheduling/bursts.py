"""Bursts: holding admission back so that several prompts share a step, where that pays.

A step with a prompt in it needs nearly every expert, however many prompts it has. With rows to
spare, waiting for several costs nothing; without, it leaves places in the decode batch empty.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.serving.scheduling.payoff import Payoff, expected_loads


class StepTimes:
    """Seconds of decode steps by the number of their sequences: a line through all of them."""

    def __init__(self) -> None:
        self._count = self._n = self._s = self._nn = self._ns = 0.0

    def add(self, num_sequences: int, seconds: float) -> None:
        """Count one step."""
        self._count += 1
        self._n += num_sequences
        self._s += seconds
        self._nn += num_sequences * num_sequences
        self._ns += num_sequences * seconds

    @property
    def fixed(self) -> float:
        """Seconds of a step that do not grow with its sequences; 0 until sizes differ."""
        spread = self._count * self._nn - self._n**2
        if spread <= 0:
            return 0.0
        each = (self._count * self._ns - self._n * self._s) / spread
        return max(0.0, (self._s - max(0.0, each) * self._n) / self._count)


class Bursts:
    """Holds admission back until `size` rows are free, or as many as requests wait.

    An empty place of a decode step costs its share of what a step takes however few are in it; a
    burst saves the loads that its prompts have in common. Where the one outweighs the other,
    judged by `WINDOW` bursts as `Payoff` does, nobody is held back for a while.
    """

    WINDOW = 8

    def __init__(self, size: int, batch: int, seconds_per_load: Callable[[], float]) -> None:
        self.payoff = Payoff(seconds_per_load, self.WINDOW)
        self.times = StepTimes()
        self._size, self._batch = size, batch
        self._steps_held, self._lost = 0, 0.0

    def holds_back(self, num_waiting: int, num_free: int, num_active: int) -> bool:
        """Whether to admit nobody in this step. Without sequences in flight no row comes free."""
        if num_active == 0 or num_free >= min(self._size, num_waiting) or self.payoff.rests():
            return False
        self._steps_held += 1
        self._lost += self.times.fixed * max(0, self._batch - num_active) / self._batch
        return True

    def count(self, unused_NK: np.ndarray, weight_K: np.ndarray) -> None:
        """Count the admission of prompts that each use an expert with 1 - `unused_NK`."""
        if self._steps_held:
            alone = sum(expected_loads(unused_K[None], weight_K) for unused_K in unused_NK)
            self.payoff.add(alone - expected_loads(unused_NK, weight_K), self._lost)
            self._steps_held, self._lost = 0, 0.0
