"""The serving loop: one forward pass after the other over all sequences in flight.

A step: take arrivals in, admit, compose, run (pending tokens of the decoding sequences and chunks
of prompts), choose tokens, predict for them. On a GPU the predictions are made while the next step
runs; its composition and first layers go by the forecast of one token earlier.

Who shares a step never decides a token: attention runs for each sequence alone, a token's experts
are summed in their own order, and sampling has its own random numbers. What is left is rounding, as
matrix products of another number of rows may differ in the last bits; in float32 the tokens are
those of each request alone but for exact near-ties.

One request never ends the others. What it raises is its own error; a step that fails is run again,
each of its sequences by itself, and only those end that fail by themselves.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from runtime.engine.engine import Engine
from runtime.engine.next_tokens import NextTokens
from runtime.serving.model_runner import Part, open_rows, open_runner
from runtime.serving.request import Finish, Request, Result
from runtime.serving.scheduling.scheduler import build_scheduler
from runtime.serving.sequence import ServedSequence
from runtime.serving.settings import ServeSettings
from runtime.serving.steps.admission import Admission
from runtime.serving.steps.arrivals import Arrivals, Cancel
from runtime.serving.steps.choices import Choices, PromptEnd
from runtime.serving.steps.failures import reason_of
from runtime.serving.steps.forecasting import Forecasting
from runtime.serving.steps.in_flight import InFlight
from runtime.serving.steps.rows import Rows
from runtime.serving.steps.watch import Watch
from runtime.serving.validation import Validator

MOST_LOST = 8
"""Times in a row that sequences start over before they have a token more."""

log = logging.getLogger(__name__)


class ServingLoop:
    """Serves requests; `submit` and `cancel` may be called from any thread, the rest from one."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: ServeSettings) -> None:
        if engine.model.config.is_encoder_decoder:  # type: ignore[union-attr]
            raise ValueError(
                "serving does not handle encoder-decoder models yet; use model.generate"
            )
        settings = settings.fitting(engine.key_value_storage)
        self._engine = engine
        # where no expert will ever be missing, there is nothing to predict
        predicts = settings.scheduler is not None or not engine.stats().all_fit
        file = engine.predictor if predicts else None
        self.scheduler = build_scheduler(
            settings,
            stack=None if file is None else file.stack,
            seconds_per_load=engine.seconds_per_load,
        )
        with engine.turn():
            self._cache = open_rows(engine, settings, self.scheduler.num_rows)
            self._runner = open_runner(engine, self._cache)
        self._forecasting = Forecasting(
            engine, file, overlaps=self._runner.overlaps, on_failure=self._forget_forecasts
        )
        text: Any = engine.model.config.get_text_config()  # type: ignore[union-attr,operator]
        self._rows = Rows(self._cache, text, reuse=settings.prefix_reuse)
        self._choices = Choices(self._rows)
        self._sequences = InFlight(engine, self._rows)
        self._admission = Admission(
            self.scheduler, settings, self._sequences, self._rows, self._choices, self._forecasting
        )
        validator = Validator(tokenizer, engine.topology.vocab_size, settings.context)
        self._arrivals = Arrivals(validator, self._sequences)
        self.watch = Watch()
        self.failure = ""
        """The reason that no request can be served any more; empty while they can."""
        self.num_steps, self.num_prefilled = 0, 0
        self.num_failed_steps, self._num_failing = 0, 0
        self._num_lost, self._generated_at_loss = 0, 0
        self.seconds = 0.0

    # ------------------------------------------------------------------ what others call

    def submit(self, request: Request) -> None:
        """Hand over a request; `step` will return its one `Result`."""
        if not isinstance(request, Request):
            raise ValueError(f"{request!r:.80} is not a Request")
        self._arrivals.put(request)

    def cancel(self, request_id: str) -> None:
        """End a request; one that is not in flight (any more) is left alone."""
        self._arrivals.put(Cancel(request_id))

    @property
    def waiting(self) -> list[ServedSequence]:
        """Sequences without a row, in the order of arrival."""
        return self._sequences.waiting

    @property
    def active(self) -> list[ServedSequence]:
        """Sequences with a row."""
        return self._sequences.active

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.active) and self._arrivals.is_empty

    @property
    def finished(self) -> Counter[Finish]:
        """Requests that ended, by how they did."""
        return self._sequences.finished

    @property
    def num_generated(self) -> int:
        """Tokens chosen."""
        return self._sequences.num_generated

    @property
    def num_reused(self) -> int:
        """Prompt tokens that did not run, as another request had run them."""
        return self._rows.num_reused

    @property
    def num_displaced(self) -> int:
        """Times that a sequence was parked because the key/value cache had no page left."""
        return self._admission.room.num_displaced

    @property
    def key_value_bytes(self) -> int:
        """Of all rows, or of all pages."""
        return self._cache.nbytes

    def step(self) -> list[Result]:
        """Run one step; returns the requests that ended. Raises ValueError once the engine is
        detached.
        """
        with self._engine.turn():
            return self._step()

    def _step(self) -> list[Result]:
        start = time.perf_counter()
        self._arrivals.take(self.failure)
        try:
            self._run_step(start)
            self._num_failing = 0
        except Exception as error:  # a model, a device, a scheduler: none of a request's own
            self._fail(error)
        self.seconds += time.perf_counter() - start
        return self._sequences.take_ended()

    def cancel_all(self, reason: str = "") -> list[Result]:
        """End everything that is in flight or was submitted."""
        self._arrivals.take(self.failure)
        self._sequences.end_all("cancelled", reason)
        return self._sequences.take_ended()

    def fail_all(self, error: str) -> list[Result]:
        """End everything with an error, and refuse all that comes."""
        self.failure = self.failure or error
        self._arrivals.take(self.failure)
        self._sequences.end_all("error", error, "server")
        return self._sequences.take_ended()

    # ------------------------------------------------------------------ run

    def _run_step(self, start: float) -> None:
        self._holds_rows()
        if not (self._runner.overlaps and self.active):  # else it happens while the step runs
            self._admission.look_ahead()
        missing_K = (~self._engine.resident_LE).astype(np.float32).reshape(-1)
        self._admission.admit(missing_K)
        decoding, prompts = self._admission.parts(missing_K)
        if parts := [*decoding, *prompts]:
            self.watch.begin(missing_K)
            self._run(parts)
            self.num_steps += 1
        if decoding and not prompts:
            self.scheduler.ordering.observe(len(decoding), time.perf_counter() - start)

    def _holds_rows(self) -> bool:
        """Whether the rows are as the last step left them. If not, sequences start over; raises
        RuntimeError where that never gets them any further.
        """
        if self._rows.claim(self.active):
            return True
        self._num_lost = self._num_lost + 1 if self._generated_at_loss == self.num_generated else 0
        self._generated_at_loss = self.num_generated
        if self.active and self._num_lost > MOST_LOST:
            raise RuntimeError(
                "what else runs on this engine writes to its key/value cache between the steps; "
                "let one end before the other begins"
            )
        return False

    def _forget_forecasts(self) -> None:
        self.scheduler.do_without_predictions()
        for sequence in self._sequences.all:
            sequence.forecast = sequence.predictor_past = None

    def _run(self, parts: Sequence[Part]) -> None:
        try:
            ran = self._runner.run(parts, self._admission.renew)
        except Exception as error:  # whatever a model or a device raises
            self.num_failed_steps += 1
            log.error("a step of %d sequences failed", len(parts), exc_info=error)
            self._run_one_by_one(parts)
            return
        if self._holds_rows():
            self._advance(parts, *ran)

    def _run_one_by_one(self, parts: Sequence[Part]) -> None:
        """After a step that failed: run each part by itself, and end those that fail again."""
        for part in parts:
            if not self._is_whole():
                return
            try:
                self._run_alone(part)
            except Exception as error:
                log.error("request %s fails by itself", part.sequence.request.id, exc_info=error)
                self._sequences.end(part.sequence, "error", reason_of(error), "server")
        self._is_whole()

    def _run_alone(self, part: Part) -> None:
        """Run a part of a step that failed; all tokens of its sequence, where some may have run and
        must not run twice.
        """
        sequence, is_done = part.sequence, self._rows.can_repeat
        if not (self._rows.grow(sequence) if is_done else self._rows.start_over(sequence)):
            return  # for want of pages; a later step runs it, or parks it
        if not is_done:
            part = self._admission.next_part(sequence)
        while True:
            is_done = is_done or part.completes
            ran = self._runner.run([part], self._admission.renew)
            if not self._holds_rows():
                return
            self._advance([part], *ran)
            if is_done:
                return
            part = self._admission.next_part(sequence)

    def _fail(self, error: Exception) -> None:
        """After an error of no sequence in particular: end those in flight, the next time all."""
        self.num_failed_steps += 1
        self._num_failing += 1
        log.error("a step failed", exc_info=error)
        ending = self.active if self._num_failing == 1 else [*self.active, *self.waiting]
        for sequence in list(ending):
            self._sequences.end(sequence, "error", reason_of(error), "server")
        self._is_whole()

    def _is_whole(self) -> bool:
        """Whether the engine can go on; if not, everything ends here."""
        try:
            if self._engine.device.type == "cuda":
                torch.cuda.synchronize(self._engine.device)
            self._engine.check_integrity()
        except Exception as error:  # a device that is lost raises whatever it is asked
            self.failure = self.failure or f"the engine cannot go on: {reason_of(error)}"
            log.critical("the engine cannot go on", exc_info=error)
            self._sequences.end_all("error", self.failure, "server")
        return not self.failure

    def _advance(
        self, parts: Sequence[Part], following: NextTokens, routes_TLK: np.ndarray
    ) -> None:
        """Choose the next tokens and predict for them."""
        self.watch.show(parts, routes_TLK)
        going, at, number = list[tuple[ServedSequence, int]](), 0, 0
        choose, is_logged = self._sequences.choose, self._engine.route_log is not None
        for sequence, num_tokens in parts:
            decoded = sequence.is_ready
            completes = decoded or num_tokens == sequence.num_pending
            first, at = at, at + num_tokens
            sequence.num_cached += num_tokens
            if is_logged:
                sequence.routes.append(routes_TLK[first:at])
            sharing: Sequence[ServedSequence] = ()
            if not decoded:
                self.num_prefilled += num_tokens
                if completes:
                    end = PromptEnd(following, number, routes_TLK[at - 1])
                    sharing = self._choices.share(sequence, end, self.active, self.waiting)
            if completes:
                for one in (sequence, *sharing):
                    if choose(one, following, number):
                        going.append((one, at - 1))
                number += 1
        if self._forecasting.is_on:
            self._forecasting.read_tokens([(one, routes_TLK[last]) for one, last in going])
