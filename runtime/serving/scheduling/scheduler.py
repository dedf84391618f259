"""The scheduler: an ordering of admission and decoding within bounds on waiting and priorities.

Bounds, whatever the ordering and the predictions: of requests that arrived later, at most
`patience` (or as many as waited when it arrived, if those were fewer) and `rows` more are admitted
before a waiting one; a sequence in flight is passed over in at most `max_skips + ceil(rows /
batch)` steps in a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np

from routing.topology import Stack
from runtime.serving.scheduling.ordering import DomainOracle, Fifo, Ordering
from runtime.serving.scheduling.paper import Paper
from runtime.serving.scheduling.predicted import Predicted
from runtime.serving.sequence import ServedSequence
from runtime.serving.settings import ServeSettings

NEARLY_ALL = 0.9
"""Share of a layer's experts: a step that uses more has hardly any left to save."""


class Scheduler:
    """Chooses from the waiting and from those in flight; counts its own time."""

    def __init__(self, ordering: Ordering, settings: ServeSettings) -> None:
        self.ordering = ordering
        self._settings = settings
        self.seconds = 0.0

    @property
    def num_rows(self) -> int:
        """Sequences in flight at the most."""
        return num_rows(self._settings, self.ordering.name)

    def admit(
        self,
        waiting: Sequence[ServedSequence],
        active: Sequence[ServedSequence],
        free: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        """Up to `free` of the `waiting` (in the order of arrival), to be admitted in this order."""
        start = time.perf_counter()
        admitted = self._admit(waiting, active, free, missing_K)
        last = max((sequence.number for sequence in admitted), default=-1)
        for sequence in waiting:
            if sequence.number < last and sequence not in admitted:
                sequence.overtaken += sum(other.number > sequence.number for other in admitted)
        self.seconds += time.perf_counter() - start
        return admitted

    def _admit(
        self,
        waiting: Sequence[ServedSequence],
        active: Sequence[ServedSequence],
        free: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        patience = self._settings.patience
        admitted = [
            sequence
            for sequence in waiting
            if sequence.overtaken >= min(patience, sequence.num_waiting_at_arrival)
        ][:free]
        others = [sequence for sequence in waiting if sequence not in admitted]
        if self.ordering.looks_ahead:
            others = [sequence for sequence in others if sequence.forecast is not None]
        if self.ordering.holds_back(len(others), free - len(admitted), len(active)):
            most = max((sequence.request.priority for sequence in active), default=0)
            others = [sequence for sequence in others if sequence.request.priority > most]
        for same in by_priority(others, self._settings.lookahead):
            beside = [*active, *admitted]
            count = free - len(admitted)
            admitted += self.ordering.admit(same, beside, count, missing_K) if count else []
        return admitted

    def compose(
        self, ready: Sequence[ServedSequence], missing_K: np.ndarray
    ) -> list[ServedSequence]:
        """The sequences of the next decode step, at most `batch` of the `ready`."""
        start = time.perf_counter()
        batch = self._settings.batch
        overdue = [sequence for sequence in ready if sequence.skipped >= self._settings.max_skips]
        chosen = sorted(overdue, key=lambda sequence: (-sequence.skipped, sequence.number))[:batch]
        others = sorted(
            (sequence for sequence in ready if sequence not in chosen),
            key=lambda sequence: sequence.number,
        )
        for same in by_priority(others, len(others)):
            count = batch - len(chosen)
            chosen += self.ordering.compose(same, chosen, count, missing_K) if count else []
        for sequence in ready:
            sequence.skipped = 0 if sequence in chosen else sequence.skipped + 1
        self.seconds += time.perf_counter() - start
        return chosen


def default_name(stack: Stack | None, batch: int) -> str:
    """The scheduler that is taken where none is named.

    Order saves loads where a step leaves experts out: of E experts, `batch` tokens of K each use
    1 - (1 - K / E) ** batch by chance. Beyond `NEARLY_ALL` it is first come, first served.
    """
    if stack is None:
        return Fifo.name
    by_chance = 1 - (1 - stack.top_k / stack.num_experts) ** batch
    return Fifo.name if by_chance > NEARLY_ALL else Predicted.name


def num_rows(settings: ServeSettings, scheduler: str | None) -> int:
    """Sequences in flight at the most under a scheduler of that name, or of whichever is taken."""
    rows = {Fifo.name: settings.batch, Paper.name: 2 * settings.batch, None: settings.rows}
    return rows.get(scheduler, settings.rows)


def by_priority(sequences: Sequence[ServedSequence], limit: int) -> Iterator[list[ServedSequence]]:
    """The first `limit` sequences in groups of one priority, the highest first, each by arrival."""
    ranked = sorted(sequences, key=lambda sequence: (-sequence.request.priority, sequence.number))[
        :limit
    ]
    for _, group in groupby(ranked, key=lambda sequence: sequence.request.priority):
        yield list(group)


def build_scheduler(
    settings: ServeSettings, *, stack: Stack | None, seconds_per_load: Callable[[], float]
) -> Scheduler:
    """The scheduler that `settings` names. stack: what is predicted, None without predictor.

    Raises ValueError where the scheduler needs a predictor and there is none.
    """
    name = settings.scheduler or default_name(stack, settings.batch)
    if name == Fifo.name:
        return Scheduler(Fifo(), settings)
    if name == DomainOracle.name:
        return Scheduler(DomainOracle(), settings)
    if stack is None:
        raise ValueError(
            f"scheduler={name!r} needs predictions: load the model with a predictor and the "
            "policy 'predicted', or take scheduler='fifo'"
        )
    if name == Paper.name:
        return Scheduler(Paper(stack.top_k), settings)
    ordering = Predicted(seconds_per_load, burst=settings.num_burst, batch=settings.batch)
    return Scheduler(ordering, settings)
