"""Decoding of sequences that are generated together: predict, schedule, run, account."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.cuda.compiling.blueprint import StepKey, StepShape
from runtime.cuda.decode.decoder import Decoder, StepInFlight
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.decode.graph_step import DecodeStep
from runtime.cuda.decode.predictor_thread import PredictorRequest
from runtime.cuda.prefetching import GENERATING
from runtime.engine.next_tokens import NOT_FINITE
from runtime.kv.static_cache import shared_cache
from runtime.prediction.route_log import RouteLog


class ChosenTokens(NamedTuple):
    """The next token of each sequence."""

    tokens_B: list[int]
    """The greedy choice."""
    logits_BV: Tensor


class BatchDecoder:
    """The steps after a prompt: one captured step for each batch size that was asked for."""

    def __init__(self, decoder: Decoder, route_log: RouteLog | None) -> None:
        self._decoder, self._route_log = decoder, route_log
        self.routes_LBK: np.ndarray | None = None
        """True routes of each sequence's last token, int64."""
        self.positions_B: np.ndarray = np.zeros(0, np.int64)
        """Positions of the tokens that run next."""
        self._tokens_B: np.ndarray = np.zeros(0, np.int64)
        self._flying: deque[StepInFlight] = deque()
        self._logged = 0
        """The prompt whose sequences the route log goes on with."""

    def begin(self, positions_B: np.ndarray) -> None:
        """A prompt has run; its next tokens have these positions."""
        self.positions_B = positions_B
        self._logged = 0 if self._route_log is None else self._route_log.num_begun

    def step_for(self, num_rows: int) -> DecodeStep:
        """The step for so many sequences, made at first use; steps in flight are dropped."""
        self.drain()
        bucket = self._decoder.model.bucket(num_rows)
        if self._decoder.model.forwards.switches(self._key(bucket)):
            for prefetch in (False, True):
                self._decoder.steps.pop((DecodeStep, bucket, prefetch), None)
        return self._captured(bucket, prefetch=self._decoder.prefetching.always)

    def _captured(self, bucket: int, *, prefetch: bool) -> DecodeStep:
        """With and without prefetching are two graphs over the same tensors."""
        steps, key = self._decoder.steps, (DecodeStep, bucket, prefetch)
        if key not in steps:
            other = steps.get((DecodeStep, bucket, not prefetch))
            experts = self._decoder.experts_call(bucket, prefetch=prefetch)
            if isinstance(other, DecodeStep):
                steps[key] = other.twin(experts)
            else:
                steps[key] = self._build(bucket, experts)
        step = steps[key]
        assert isinstance(step, DecodeStep)
        return step

    def _build(self, bucket: int, experts: ExpertsCall) -> DecodeStep:
        model = self._decoder.model
        cache = shared_cache(model.storage, model.config)
        forward = model.forwards.of(self._key(bucket))
        return DecodeStep(
            model.model, forward, cache, experts, batch=bucket, context=model.context,
            device=model.device, stream=model.stream,
        )  # fmt: skip

    def run(
        self, step: DecodeStep, num_rows: int, tokens_B: Tensor | None, more: bool = False
    ) -> ChosenTokens:
        """One decode step, for the given tokens [B] or for those that the last step chose.

        more: another such step follows. It is enqueued at once, and runs while this one is
        accounted for.
        """
        start = time.perf_counter()
        if not self._flying:
            self._launch(step, num_rows, tokens_B)
        if more and self._decoder.driver.runs_ahead:
            self._launch(step, num_rows, None)
        flight = self._flying.popleft()
        chosen = self._account(flight, more)
        seconds = time.perf_counter() - start
        self._decoder.count_time(flight, GENERATING, seconds)
        return chosen

    def _launch(self, step: DecodeStep, num_rows: int, tokens_B: Tensor | None) -> None:
        """Enqueue one step and the copy of its outcome to the host."""
        decoder = self._decoder
        if tokens_B is not None:
            self._tokens_B = tokens_B.cpu().numpy()
            padding = step.batch - num_rows
            step.ids_B1[:, 0] = torch.cat([tokens_B, tokens_B[-1:].expand(padding)])
        decoder.take_over()
        decoder.driver.begin_step()
        prefetch = decoder.prefetching.in_next_step(GENERATING)
        step = self._captured(step.batch, prefetch=prefetch)
        self._flying.append(decoder.enqueue(step, num_rows))
        key = self._key(step.batch)
        decoder.model.forwards.seen(key, partial(self._shape, key, step))
        if tokens_B is not None:
            self._announce()

    def _key(self, bucket: int) -> StepKey:
        return StepKey(GENERATING, bucket, self._decoder.model.storage.batch)

    def _shape(self, key: StepKey, step: DecodeStep) -> StepShape:
        own = step.has_own_attention
        return self._decoder.model.shape(key, step.cache, own_attention=own)

    def _announce(self) -> None:
        """Tell the predictor what runs now. The step is on its way already."""
        request = PredictorRequest(
            self._tokens_B[:, None], self.positions_B[:, None], self.routes_LBK, is_new=False
        )
        if self._decoder.driver.predict(request):
            self.positions_B = self.positions_B + 1

    def _account(self, flight: StepInFlight, more: bool) -> ChosenTokens:
        """Wait for a step. Its tokens and routes go to the predictor first: the next step runs
        already, and waits for nothing else.
        """
        decoder, before_B = self._decoder, self._tokens_B
        result = decoder.finish(flight)
        if np.isnan(result.best_B).any():
            raise FloatingPointError(NOT_FINITE)
        self._tokens_B, self.routes_LBK = result.tokens_B, result.routes_LBK
        decoder.driver.end_step(result.routes_LBK)
        if more:
            self._announce()
        decoder.count(flight, result.ledger)
        if self._route_log is not None and self._route_log.num_begun == self._logged:
            self._route_log.follow(before_B, result.routes_LBK.swapaxes(0, 1))
        assert flight.step.logits_BV is not None
        return ChosenTokens(result.tokens_B.tolist(), flight.step.logits_BV[: flight.num_rows])

    def drain(self) -> None:
        """Wait for steps in flight whose results nobody wants any more."""
        while self._flying:
            self._decoder.forget(self._flying.pop())
