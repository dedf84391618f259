"""The sequences of a loop, waiting and in flight, from their first token to their end."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import numpy as np

from runtime.engine.engine import Engine
from runtime.engine.next_tokens import NextTokens
from runtime.engine.step_inputs import end_tokens
from runtime.serving.request import Fault, Finish, Result
from runtime.serving.sequence import ServedSequence
from runtime.serving.steps.failures import PASSED_ON, fault_in_step, reason_of, refusal
from runtime.serving.steps.rows import Rows

log = logging.getLogger(__name__)


class InFlight:
    """Who waits, who has a row, and the results of those that have ended."""

    def __init__(self, engine: Engine, rows: Rows) -> None:
        self._engine, self._rows = engine, rows
        self.waiting: list[ServedSequence] = []
        """In the order of arrival."""
        self.active: list[ServedSequence] = []
        self.ended: list[Result] = []
        """Since `take_ended` was last called."""
        self.finished: Counter[Finish] = Counter()
        self.num_generated = 0
        self.eos_ids = end_tokens(engine.model)

    @property
    def all(self) -> list[ServedSequence]:
        return [*self.waiting, *self.active]

    def take_ended(self) -> list[Result]:
        """The results since the last call."""
        ended, self.ended = self.ended, []
        self.finished.update(result.finish for result in ended)
        return ended

    def choose(self, sequence: ServedSequence, following: NextTokens, number: int) -> bool:
        """Choose the next token, of that `number`; False where the request ends."""
        try:
            finish = sequence.accept(following, number)
        except PASSED_ON:
            raise
        except BaseException as error:  # a sampler, a tokenizer, a callback: only its request ends
            self.end(sequence, "error", reason_of(error), fault_in_step(error))
            return False
        self.num_generated += sequence.request.max_tokens > 0
        if finish is not None:
            self.end(sequence, finish)
        return finish is None

    def end_all(self, finish: Finish, error: str = "", fault: Fault = "") -> None:
        """End every sequence."""
        for sequence in self.all:
            self.end(sequence, finish, error, fault)

    def end(
        self, sequence: ServedSequence, finish: Finish, error: str = "", fault: Fault = ""
    ) -> None:
        """End a sequence: its row is free, and its result waits to be taken."""
        (self.active if sequence in self.active else self.waiting).remove(sequence)
        self._rows.release(sequence, is_sound=finish != "error")
        self._record(sequence)
        try:
            result = replace(sequence.result(finish, error), fault=fault)
        except Exception as own:  # whoever waits for the request has to hear of its end
            log.error("a result cannot be made", exc_info=own)
            result = refusal(sequence.request, reason_of(own), "server")
        self.ended.append(result)

    def _record(self, sequence: ServedSequence) -> None:
        """Add what ran to the route log, if there is one; whatever fails there ends no request."""
        route_log = self._engine.route_log
        if route_log is None or not sequence.routes:
            return
        try:
            tokens_T, routes_TLK = np.array(sequence.token_ids), np.concatenate(sequence.routes)
            route_log.add(tokens_T[: len(routes_TLK)], routes_TLK, sequence.num_prompt)
        except Exception as error:
            log.warning("the routes of a request are not recorded", exc_info=error)
