"""Counts that are made after what they count: while a device is busy, or when they are read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np


class DueCounts:
    """A count of each layer, int64 [L]. Any thread that reads it gets all that is due in it."""

    def __init__(self, num_layers: int) -> None:
        self._counts_L = np.zeros(num_layers, np.int64)
        self._due: deque[Callable[[], np.ndarray]] = deque()
        self._lock = threading.Lock()

    def add(self, counts_L: np.ndarray) -> None:
        """Add int [L] at once."""
        self._counts_L += counts_L

    def add_later(self, count: Callable[[], np.ndarray]) -> None:
        """Add what `count` returns, int [L], when there is time or somebody reads."""
        self._due.append(count)

    def catch_up(self) -> None:
        """Make the counts that are due."""
        with self._lock:
            while self._due:
                self._counts_L += self._due.popleft()()

    @property
    def counts_L(self) -> np.ndarray:
        """The counts, none of them due. A part of them may be added to in place."""
        self.catch_up()
        return self._counts_L
