"""Admission: the step's part before anything runs. Who gets a row, who gives one back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from runtime.serving.model_runner import Part
from runtime.serving.scheduling.scheduler import Scheduler
from runtime.serving.scheduling.turns import turns_of
from runtime.serving.sequence import ServedSequence
from runtime.serving.settings import ServeSettings
from runtime.serving.steps.choices import Choices
from runtime.serving.steps.forecasting import Forecasting
from runtime.serving.steps.in_flight import InFlight
from runtime.serving.steps.room import Room
from runtime.serving.steps.rows import Rows

Chosen = TypeVar("Chosen")


class Admission:
    """Carries out what the scheduler chooses."""

    def __init__(
        self,
        scheduler: Scheduler,
        settings: ServeSettings,
        sequences: InFlight,
        rows: Rows,
        choices: Choices,
        forecasting: Forecasting,
    ) -> None:
        self._scheduler, self._settings, self._sequences = scheduler, settings, sequences
        self._rows, self._choices, self._forecasting = rows, choices, forecasting
        self.room = Room(rows)

    def look_ahead(self) -> None:
        """Predict for some waiting prompts, those whose turn comes first, before admission."""
        sequences = self._sequences
        if self._forecasting.is_on and self._scheduler.ordering.looks_ahead:
            near = self._scheduler.in_turn(sequences.waiting, sequences.active)
            unread = [sequence for sequence in near if sequence.forecast is None]
            self._forecasting.read_prompts(unread[: self._settings.batch])

    def renew(self) -> None:
        """Make the forecasts that are missing, and some that will be wanted here."""
        self._forecasting.renew()
        self.look_ahead()

    def admit(self, missing_K: np.ndarray) -> None:
        """Give the free rows to waiting sequences."""
        sequences, first = self._sequences, self._make_room()
        begun = []
        for sequence in self._admitted(missing_K, first):
            self._forecasting.read_prompts([sequence])
            sequences.waiting.remove(sequence)
            sequences.active.append(sequence)
            end = self._choices.take_row(sequence, sequences.active)
            if end is not None and sequences.choose(sequence, end.following, end.number):
                begun.append((sequence, end.routes_LK))
        self._choices.forget(sequences.waiting)
        self._wait_again(self.room.grow(sequences.active))
        self._forecasting.read_tokens(begun)
        if self._forecasting.is_on:
            for sequence in sequences.waiting:
                sequence.forget()

    def _admitted(self, missing_K: np.ndarray, first: list[ServedSequence]) -> list[ServedSequence]:
        admit, room = self._scheduler.admit, self.room
        waiting, active = self._sequences.waiting, self._sequences.active
        free = self._rows.num_free and min(self._rows.num_free, room.most(waiting, active))
        if not free:
            return []
        first = [*first, *room.first(waiting)]
        return self._scheduled(
            lambda: admit(waiting, active, free, missing_K, first, partial(room.fitting, active))
        )

    def _make_room(self) -> list[ServedSequence]:
        """Park sequences of large groups while others wait for their turn; returns the latter."""
        sequences, rows = self._sequences, self._rows
        first: list[ServedSequence] = []
        parked: list[ServedSequence] = []
        if not any(sequence.request.group for sequence in sequences.active):
            return first
        while rows.num_free == len(first) and rows.num_parked < rows.num_rows:
            waiting = [sequence for sequence in sequences.waiting if sequence not in first]
            yielding = self._scheduler.next_to_yield(waiting, [*sequences.active, *first])
            if yielding is None or yielding.sequence not in sequences.active:
                break
            rows.park(yielding.sequence)
            sequences.active.remove(yielding.sequence)
            parked.append(yielding.sequence)
            first.append(yielding.to)
        self._wait_again(parked)
        return first

    def _wait_again(self, parked: list[ServedSequence]) -> None:
        """Let sequences that were parked wait as if they had just come."""
        sequences = self._sequences
        for sequence in parked:
            sequence.overtaken, sequence.skipped = 0, 0
            sequence.num_waiting_at_arrival = len(sequences.waiting) + len(parked)
        if parked:
            sequences.active[:] = [one for one in sequences.active if one not in parked]
            sequences.waiting += parked
            sequences.waiting.sort(key=lambda sequence: sequence.number)

    def parts(self, missing_K: np.ndarray) -> tuple[list[Part], list[Part]]:
        """Of the next step: a token each of the sequences that decode in it, and prompts."""
        ready, beginning = list[ServedSequence](), list[ServedSequence]()
        for sequence in self._sequences.active:
            (ready if sequence.is_ready else beginning).append(sequence)
        chosen = self._scheduled(lambda: self._scheduler.compose(ready, missing_K))
        return [Part(sequence, 1) for sequence in chosen], self._chunks(beginning)

    def _chunks(self, beginning: list[ServedSequence]) -> list[Part]:
        """Prompts, by turns and in the order of admission, until the step has enough tokens."""
        parts: list[Part] = []
        left = self._settings.chunk
        turns = turns_of(self._choices.leaders(beginning))
        for sequence in sorted(turns, key=lambda one: turns[one]):
            if left > 0:
                parts.append(self.next_part(sequence, left))
                left -= parts[-1].num_tokens
        return parts

    def next_part(self, sequence: ServedSequence, most: int | None = None) -> Part:
        """The next piece of a prompt, of at most `most` tokens where it may come in pieces."""
        if self._rows.runs_prompts_whole:
            return Part(sequence, sequence.num_pending)
        return Part(sequence, sequence.next_chunk(most or self._settings.chunk))

    def _scheduled(self, choose: Callable[[], Chosen]) -> Chosen:
        """The scheduler's choice; where it fails over forecasts, the choice without them."""
        try:
            return choose()
        except Exception as error:
            if not self._scheduler.ordering.needs_forecasts:
                raise
            self._forecasting.give_up(error)
            return choose()
