"""The payoff of ordering by prediction: the time it saves against the time it takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class Payoff:
    """Compares the time that choices take with the time of the loads they save.

    saved loads (expected, against first come first served) x measured seconds of one load, over
    `window` choices. Where that is not half of what the choosing took, or less than all of it twice
    in a row (times are noisy), choosing rests: `REST` steps, then twice as long each time until it
    pays, `LONGEST` at the most. With everything resident nothing is saved, so it rests.
    """

    WINDOW = 32
    REST, LONGEST = 64, 512

    def __init__(self, seconds_per_load: Callable[[], float], window: int = WINDOW) -> None:
        self._seconds_per_load, self._window = seconds_per_load, window
        self._choices, self._losses = 0, 0
        self._rest, self._next_rest = 0, self.REST
        self._saved, self._spent = 0.0, 0.0
        self.times_rested = 0

    @property
    def resting(self) -> bool:
        return self._rest > 0

    def rests(self) -> bool:
        """True while choosing rests; call once for each step that offers a choice."""
        if self._rest:
            self._rest -= 1
            return True
        return False

    def rest(self) -> None:
        """Begin to rest, because a choice has nothing to save."""
        self._rest, self._losses = self._next_rest, 0
        self._next_rest = min(2 * self._next_rest, self.LONGEST)
        self._choices, self._saved, self._spent = 0, 0.0, 0.0
        self.times_rested += 1

    def add(self, saved_loads: float, seconds: float) -> None:
        """Count one choice."""
        self._saved += saved_loads
        self._spent += seconds
        self._choices += 1
        if self._choices == self._window:
            gained, spent = self._saved * self._seconds_per_load(), self._spent
            self._choices, self._saved, self._spent = 0, 0.0, 0.0
            self._judge(gained, spent)

    def _judge(self, gained: float, spent: float) -> None:
        if gained > spent:
            self._losses, self._next_rest = 0, self.REST
            return
        self._losses += 1
        if self._losses == 2 or gained <= spent / 2:
            self.rest()


def expected_loads(unused_NK: np.ndarray, weight_K: np.ndarray) -> float:
    """Expected number of experts, weighted by `weight_K`, that any of the rows uses."""
    return float(weight_K @ (1 - unused_NK.prod(0)))
