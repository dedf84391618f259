"""The scheduler: an ordering of admission and decoding within bounds on waiting and priorities.

Bounds, whatever the ordering and the predictions: of requests that arrived later, at most
`patience` (or as many as waited when it arrived, if those were fewer) and `rows` more are admitted
before a waiting one; a sequence in flight is passed over in at most `max_skips + ceil(rows /
batch)` steps in a row. Groups of requests take turns (`turns`): the bound on waiting is that of a
group's first that waits, from when the group has no more rows than any other that waits.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import numpy as np

from routing.topology import Stack
from runtime.serving.scheduling.ordering import DomainOracle, Fifo, Ordering
from runtime.serving.scheduling.paper import Paper
from runtime.serving.scheduling.predicted import Predicted
from runtime.serving.scheduling.turns import NUMBER, Yielding, heads, in_turn, owed, turns_of
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
        first: Sequence[ServedSequence] = (),
        fitting: Callable[[list[ServedSequence]], list[ServedSequence]] = list,
    ) -> list[ServedSequence]:
        """Up to `free` of the `waiting` (in the order of arrival), to be admitted in this order.

        first: those that others made room for. fitting: of those chosen, the first that there is
        memory for.
        """
        start = time.perf_counter()
        admitted = fitting(self._admit(waiting, active, free, missing_K, first))
        numbers, begin = sorted(sequence.number for sequence in admitted), set(admitted)
        for sequence in heads(waiting) if admitted else []:
            if sequence not in begin:
                sequence.overtaken += len(numbers) - bisect(numbers, sequence.number)
        self.seconds += time.perf_counter() - start
        return admitted

    def _admit(
        self,
        waiting: Sequence[ServedSequence],
        active: Sequence[ServedSequence],
        free: int,
        missing_K: np.ndarray,
        first: Sequence[ServedSequence],
    ) -> list[ServedSequence]:
        admitted = [*first, *self._overdue(waiting, active)]
        admitted = list(dict.fromkeys(admitted))[:free]
        begin = set(admitted)
        others = [sequence for sequence in waiting if sequence not in begin]
        if self.ordering.looks_ahead:
            others = [sequence for sequence in others if sequence.forecast is not None]
        if self.ordering.holds_back(len(others), free - len(admitted), len(active)):
            most = max((sequence.request.priority for sequence in active), default=0)
            now = {yielding.to for yielding in owed(others, active)}
            others = [one for one in others if one.request.priority > most or one in now]
        beside = [*active, *admitted]
        for same in in_turn(others, beside, self._settings.lookahead):
            count = free - len(admitted)
            chosen = self.ordering.admit(same, beside, count, missing_K) if count else []
            admitted += chosen
            beside += chosen
        return admitted

    def _overdue(
        self, waiting: Sequence[ServedSequence], active: Sequence[ServedSequence]
    ) -> list[ServedSequence]:
        """Those that have waited long enough, of the groups whose turn it is."""
        turns = turns_of(heads(waiting), active)
        least, patience = min(turns.values(), default=0), self._settings.patience
        return [
            sequence
            for sequence, turn in turns.items()
            if turn == least
            and sequence.overtaken >= min(patience, sequence.num_waiting_at_arrival)
        ]

    def next_to_yield(
        self, waiting: Sequence[ServedSequence], active: Sequence[ServedSequence]
    ) -> Yielding | None:
        """The sequence in flight that is to make room, where groups have unequal shares."""
        if not any(one.request.group for one in active):
            return None
        return next(owed(self.in_turn(waiting, active), active), None)

    def in_turn(
        self, waiting: Sequence[ServedSequence], active: Sequence[ServedSequence]
    ) -> list[ServedSequence]:
        """The waiting sequences that admission chooses from, in order."""
        ranked = in_turn(waiting, active, self._settings.lookahead)
        return [sequence for same in ranked for sequence in same]

    def do_without_predictions(self) -> None:
        """First come, first served from here on, where the ordering reads forecasts."""
        if self.ordering.needs_forecasts:
            self.ordering = Fifo()

    def compose(
        self, ready: Sequence[ServedSequence], missing_K: np.ndarray
    ) -> list[ServedSequence]:
        """The sequences of the next decode step, at most `batch` of the `ready`."""
        start = time.perf_counter()
        batch = self._settings.batch
        overdue = [sequence for sequence in ready if sequence.skipped >= self._settings.max_skips]
        chosen = _by_skips(overdue)[:batch]
        first = set(chosen)
        others = _by_skips([one for one in ready if one not in first] if first else ready)
        # within a group, whoever waited longest; `in_turn` sorts the rest by arrival
        for same in in_turn(others, chosen, len(others)):
            count = batch - len(chosen)
            chosen += self.ordering.compose(same, chosen, count, missing_K) if count else []
        runs = set(chosen)
        for sequence in ready:
            sequence.skipped = 0 if sequence in runs else sequence.skipped + 1
        self.seconds += time.perf_counter() - start
        return chosen


def _by_skips(sequences: Iterable[ServedSequence]) -> list[ServedSequence]:
    """The one that was passed over most often first, then by arrival."""
    return sorted(sorted(sequences, key=NUMBER), key=attrgetter("skipped"), reverse=True)


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
