"""The contract of the rules that need a cache of their own: simulated only.

Like `ExpertCache`, a request first takes note of its hits. Then it loads what is missing, and what
it needs itself is evicted last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable
from typing import ClassVar

import numpy as np

Queue = dict[int, int]
"""Keys from the oldest to the newest, each with a count."""


class QueueCache(ABC):
    """A cache of experts that knows which are resident. A *key* is layer * E + expert."""

    name: ClassVar[str]

    def __init__(self, num_layers: int, num_experts: int, num_slots: int) -> None:
        self.num_layers, self.num_experts, self.num_slots = num_layers, num_experts, num_slots

    def request(self, layer: int, experts: np.ndarray) -> int:
        """Serve the distinct `experts` (int64 [N]) of one call; returns the number of loads."""
        keys = (layer * self.num_experts + experts).tolist()
        missing = [key for key in keys if not self._hit(key)]
        for key in missing:
            self._load(key, frozenset(keys))
        return len(missing)

    @abstractmethod
    def residents(self) -> set[int]:
        """The keys of all residents."""

    @abstractmethod
    def _hit(self, key: int) -> bool:
        """Take note of a use if the expert is resident; False if it is not."""

    @abstractmethod
    def _load(self, key: int, pinned: frozenset[int]) -> None:
        """Make the expert resident, evicting others where no slot is free."""


def oldest(queue: Iterable[int], pinned: Container[int]) -> int | None:
    """The oldest key that is not pinned; None if there is none."""
    return next((key for key in queue if key not in pinned), None)
