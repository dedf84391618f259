"""The serving loop: one forward pass after the other over all sequences in flight.

A step: take arrivals in, admit, compose, run (pending tokens of the decoding sequences and chunks
of prompts), choose tokens, predict for them. On a GPU the predictions are made while the next step
runs; its composition and first layers go by the forecast of one token earlier.

Who shares a step never decides a token: attention runs for each sequence alone, a token's experts
are summed in their own order, and sampling has its own random numbers. What is left is rounding, as
matrix products of another number of rows may differ in the last bits; in float32 the tokens are
those of each request alone but for exact near-ties.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from torch import Tensor

from routing.predictor_file.driver import Past
from runtime.engine.engine import Engine
from runtime.engine.next_tokens import NextTokens
from runtime.engine.step_inputs import end_tokens
from runtime.prediction.sequence_forecaster import SequenceForecast, SequenceForecaster
from runtime.serving.model_runner import Part, open_rows, open_runner
from runtime.serving.request import Finish, Request, Result
from runtime.serving.scheduling.scheduler import build_scheduler
from runtime.serving.sequence import ServedSequence
from runtime.serving.settings import ServeSettings
from runtime.serving.validation import Validator


class ServingLoop:
    """Serves requests; `submit` and `cancel` may be called from any thread, the rest from one."""

    def __init__(self, engine: Engine, tokenizer: Any, settings: ServeSettings) -> None:
        if engine.model.config.is_encoder_decoder:  # type: ignore[union-attr]
            raise ValueError(
                "serving does not handle encoder-decoder models yet; use model.generate"
            )
        settings = settings.fitting(engine.key_value_storage)
        self._engine, self._settings = engine, settings
        self._validator = Validator(tokenizer, engine.topology.vocab_size, settings.context)
        file = engine.predictor
        if settings.scheduler is None and engine.stats().all_fit:
            file = None  # no expert will ever be missing, so there is nothing to predict
        self._forecaster = None if file is None else SequenceForecaster(file)
        self.scheduler = build_scheduler(
            settings,
            stack=None if file is None else file.stack,
            seconds_per_load=engine.seconds_per_load,
        )
        with engine.turn():
            self._cache = open_rows(engine, settings, self.scheduler.num_rows)
            self._runner = open_runner(engine, self._cache)
        self._unpredicted: tuple[list[ServedSequence], np.ndarray] | None = None
        """Sequences whose newest token has no forecast yet, and the routes of the token before."""
        self._inbox: SimpleQueue[Request | str] = SimpleQueue()
        self.waiting: list[ServedSequence] = []
        self.active: list[ServedSequence] = []
        self.finished: Counter[Finish] = Counter()
        self.num_steps, self.num_generated, self.num_prefilled = 0, 0, 0
        self.seconds = 0.0
        self._num_arrived = 0
        self._eos_ids = end_tokens(engine.model)

    # ------------------------------------------------------------------ what others call

    def submit(self, request: Request) -> None:
        """Hand over a request; `step` will return its one `Result`."""
        self._inbox.put(request)

    def cancel(self, request_id: str) -> None:
        """End a request; one that is not in flight (any more) is left alone."""
        self._inbox.put(request_id)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.active) and self._inbox.empty()

    @property
    def key_value_bytes(self) -> int:
        """Bytes of all rows."""
        return self._cache.nbytes

    def step(self) -> list[Result]:
        """Run one step; returns the requests that ended. Raises ValueError once the engine is
        detached.
        """
        with self._engine.turn():
            return self._step()

    def _step(self) -> list[Result]:
        start = time.perf_counter()
        results = self._take_inbox()
        if not (self._runner.overlaps and self.active):  # else it happens while the step runs
            self._look_ahead()
        missing_K = self._missing_K()
        self._admit(missing_K)
        decoding, prompts = self._decoding(missing_K), self._chunks()
        if parts := [*decoding, *prompts]:
            following, routes_TLK = self._runner.run(parts, self._renew)
            results += self._advance(parts, following, routes_TLK)
            self.num_steps += 1
        self.finished.update(result.finish for result in results)
        seconds = time.perf_counter() - start
        if decoding and not prompts:
            self.scheduler.ordering.observe(len(decoding), seconds)
        self.seconds += seconds
        return results

    def cancel_all(self) -> list[Result]:
        """End everything that is in flight or was submitted."""
        return self._end_all("cancelled")

    def fail_all(self, error: str) -> list[Result]:
        """End everything with an error, after a step that raised."""
        return self._end_all("error", error)

    def _end_all(self, finish: Finish, error: str = "") -> list[Result]:
        results = self._take_inbox()
        results += [
            self._end(sequence, finish, error) for sequence in (*self.waiting, *self.active)
        ]
        self.finished.update(result.finish for result in results)
        return results

    # ------------------------------------------------------------------ arrivals

    def _take_inbox(self) -> list[Result]:
        results: list[Result] = []
        first = self._num_arrived
        while True:
            try:
                item = self._inbox.get_nowait()
            except Empty:
                break
            if isinstance(item, str):
                flying = (*self.waiting, *self.active)
                sequences = [sequence for sequence in flying if sequence.request.id == item]
                results += [self._end(sequence, "cancelled") for sequence in sequences]
            else:
                results += self._arrive(item)
        for sequence in self.waiting:
            if sequence.number >= first:
                sequence.num_waiting_at_arrival = len(self.waiting)
        return results

    def _arrive(self, request: Request) -> list[Result]:
        """Queue a request; a bad one ends here, whatever it makes a library raise."""
        tokenizer, number = self._validator.tokenizer, self._num_arrived
        try:
            if any(request.id == sequence.request.id for sequence in (*self.waiting, *self.active)):
                raise ValueError(f"a request with the id {request.id!r} is in flight already")
            prompt_ids = self._validator.encode(request)
            sequence = ServedSequence(request, prompt_ids, tokenizer, number)
        except Exception as error:
            return [Result.refusing(request, error)]
        self.waiting.append(sequence)
        self._num_arrived += 1
        return []

    # ------------------------------------------------------------------ schedule

    def _look_ahead(self) -> None:
        """Predict for some waiting prompts, oldest first, ahead of their admission."""
        if self._forecaster is not None and self.scheduler.ordering.looks_ahead:
            near = self.waiting[: self._settings.lookahead]
            for sequence in [sequence for sequence in near if sequence.forecast is None][
                : self._settings.batch
            ]:
                self._read_prompt(sequence)

    def _read_prompt(self, sequence: ServedSequence) -> None:
        if self._forecaster is None or sequence.predictor_past is not None:
            return
        with self._engine.stats().timer("predict"):
            sequence.predictor_past = Past(self._forecaster.file, 1, sequence.limit)
            sequence.forecast = self._forecaster.read_prompt(
                sequence.predictor_past, sequence.token_ids
            )

    def _missing_K(self) -> np.ndarray:
        return (~self._engine.resident_LE).astype(np.float32).reshape(-1)

    def _admit(self, missing_K: np.ndarray) -> None:
        free = self._cache.num_free
        admitted = self.scheduler.admit(self.waiting, self.active, free, missing_K) if free else []
        for sequence in admitted:
            self._read_prompt(sequence)
            sequence.row = self._cache.take()
            self.waiting.remove(sequence)
            self.active.append(sequence)
        for sequence in self.waiting:
            sequence.forget()

    def _decoding(self, missing_K: np.ndarray) -> list[Part]:
        ready = [sequence for sequence in self.active if sequence.is_ready]
        return [Part(sequence, 1) for sequence in self.scheduler.compose(ready, missing_K)]

    def _chunks(self) -> list[Part]:
        """Prompts, in the order of admission, until the step has enough of their tokens."""
        parts, left = [], self._settings.chunk
        for sequence in self.active:
            if not sequence.is_ready and left:
                parts.append(Part(sequence, min(sequence.num_pending, left)))
                left -= parts[-1].num_tokens
        return parts

    # ------------------------------------------------------------------ account

    def _advance(
        self, parts: Sequence[Part], following: NextTokens, routes_TLK: np.ndarray
    ) -> list[Result]:
        """Choose the next tokens and predict for them; returns the requests that ended."""
        results, going, at, row = [], [], -1, 0
        for part in parts:
            sequence, completes, decoded = part.sequence, part.completes, part.sequence.is_ready
            at += part.num_tokens
            sequence.num_cached += part.num_tokens
            if self._engine.route_log is not None:
                sequence.routes.append(routes_TLK[at - part.num_tokens + 1 : at + 1])
            self.num_prefilled += 0 if decoded else part.num_tokens
            if completes:
                ended = self._choose(sequence, following.greedy_N[row], following.logits_NV[row])
                row += 1
                going += [] if ended else [(sequence, at)]
                results += ended
        self._predict([sequence for sequence, _ in going], routes_TLK[[at for _, at in going]])
        return results

    def _choose(self, sequence: ServedSequence, greedy: int, logits_V: Tensor) -> list[Result]:
        try:
            finish = sequence.accept(greedy, logits_V, self._eos_ids)
        except (
            Exception
        ) as error:  # a streaming callback may fail in any way; only its request ends
            return [self._end(sequence, "error", f"{type(error).__name__}: {error}")]
        self.num_generated += 1
        return [] if finish is None else [self._end(sequence, finish)]

    def _predict(self, sequences: list[ServedSequence], routes_BLK: np.ndarray) -> None:
        """Score the forecasts of the tokens that ran, and predict for the chosen ones."""
        if self._forecaster is None or not sequences:
            return
        forecasts = [sequence.forecast for sequence in sequences if sequence.forecast is not None]
        self._score(sequences, forecasts, routes_BLK)
        if not self._runner.overlaps:
            self._predict_chosen(sequences, routes_BLK)
            return
        self._unpredicted = sequences, routes_BLK
        for sequence, forecast in zip(sequences, forecasts, strict=True):
            sequence.forecast = forecast.stale()

    def _renew(self) -> None:
        """Make the forecasts that are missing, and some that admission will want."""
        if self._unpredicted is not None:
            unpredicted, self._unpredicted = self._unpredicted, None
            self._predict_chosen(*unpredicted)
        self._look_ahead()

    def _predict_chosen(self, sequences: list[ServedSequence], routes_BLK: np.ndarray) -> None:
        assert self._forecaster is not None
        before = [sequence.forecast for sequence in sequences if sequence.forecast is not None]
        pasts = [
            sequence.predictor_past for sequence in sequences if sequence.predictor_past is not None
        ]
        with self._engine.stats().timer("predict"):
            newest = [sequence.token_ids[-1] for sequence in sequences]
            forecasts = self._forecaster.step(pasts, newest, routes_BLK, before)
        for sequence, forecast in zip(sequences, forecasts, strict=True):
            sequence.forecast = forecast

    def _score(
        self,
        sequences: Sequence[ServedSequence],
        forecasts: Sequence[SequenceForecast],
        routes_BLK: np.ndarray,
    ) -> None:
        """Count the recall of the forecasts for the tokens that were decoded."""
        decoded = [index for index, sequence in enumerate(sequences) if sequence.num_generated > 1]
        if decoded:
            logits_BLE = np.stack([forecasts[index].logits_LE for index in decoded])
            self._engine.stats().count_recall(logits_BLE, routes_BLK[decoded])

    def _end(self, sequence: ServedSequence, finish: Finish, error: str = "") -> Result:
        if sequence.row >= 0:
            self._cache.release(sequence.row)
        (self.active if sequence in self.active else self.waiting).remove(sequence)
        if self._engine.route_log is not None and sequence.routes:
            tokens_T, routes_TLK = np.array(sequence.token_ids), np.concatenate(sequence.routes)
            self._engine.route_log.add(tokens_T[: len(routes_TLK)], routes_TLK, sequence.num_prompt)
        return sequence.result(finish, error)
