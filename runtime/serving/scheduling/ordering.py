"""Orders of work: which waiting request to admit, which sequences to decode together.

An ordering only chooses among what `runtime.serving.scheduling.scheduler` offers it; bounds on
waiting and priorities are kept there, for all orderings alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from runtime.serving.sequence import ServedSequence


class Ordering(ABC):
    """Chooses sequences. All lists come in the order of arrival."""

    name: ClassVar[str]
    needs_forecasts: ClassVar[bool] = False
    """Whether its choices read the sequences' forecasts."""

    @property
    def looks_ahead(self) -> bool:
        """Whether waiting requests must have a forecast before they can be admitted."""
        return False

    def observe(self, num_sequences: int, seconds: float) -> None:  # noqa: B027 - most do not care
        """Told of every step without prompts: how many sequences it had, how long it took."""

    def holds_back(self, num_waiting: int, num_free: int, num_active: int) -> bool:
        """Whether to admit nobody now, so that prompts run together later. num_free: rows."""
        return False

    def admit(
        self,
        waiting: Sequence[ServedSequence],
        active: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        """Up to `count` of `waiting` to put beside `active`.

        missing_K: float32 over the L * E experts, 1 where an expert is not resident.
        """
        return list(waiting[:count])

    @abstractmethod
    def compose(
        self,
        ready: Sequence[ServedSequence],
        chosen: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        """Up to `count` of `ready` for the next step, beside those `chosen` already."""


class Fifo(Ordering):
    """Oldest first."""

    name = "fifo"

    def compose(
        self,
        ready: Sequence[ServedSequence],
        chosen: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        return list(ready[:count])


class DomainOracle(Ordering):
    """Requests of one label together, as if somebody had sorted them: a reference."""

    name = "domain-oracle"

    def __init__(self) -> None:
        self._label = ""

    def admit(
        self,
        waiting: Sequence[ServedSequence],
        active: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        running = Counter(sequence.request.label for sequence in active)
        queued = Counter(sequence.request.label for sequence in waiting)
        ranks = [
            (running[sequence.request.label], queued[sequence.request.label])
            for sequence in waiting
        ]
        order = sorted(range(len(waiting)), key=lambda i: (*(-n for n in ranks[i]), i))
        return [waiting[i] for i in order[:count]]

    def compose(
        self,
        ready: Sequence[ServedSequence],
        chosen: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        sizes = Counter(sequence.request.label for sequence in ready)
        if not sizes[self._label]:
            self._label = max(sizes, key=sizes.__getitem__, default="")
        ranked = sorted(
            ready,
            key=lambda sequence: (
                sequence.request.label != self._label,
                -sizes[sequence.request.label],
                sequence.request.label,
                sequence.number,
            ),
        )
        return ranked[:count]
