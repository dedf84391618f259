"""Sequences that are generated together, step by step: predict, schedule, run, account."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.cuda.decode.decoder import Decoder, StepInFlight
from runtime.cuda.decode.experts_call import ExpertsCall
from runtime.cuda.decode.graph_step import DecodeStep
from runtime.cuda.decode.predictor_thread import PredictorRequest
from runtime.engine.next_tokens import NOT_FINITE
from runtime.kv.static_cache import SharedCache


class ChosenTokens(NamedTuple):
    """What a step gave."""

    tokens_B: list[int]
    """The greedy choice."""
    logits_BV: Tensor


class BatchDecoder:
    """The steps after a prompt, one captured step for each batch size that was asked for."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.routes_LBK: np.ndarray | None = None
        """True routes of each sequence's last token, int64."""
        self.positions_B: np.ndarray = np.zeros(0, np.int64)
        """Of the tokens that run next."""
        self._tokens_B: np.ndarray = np.zeros(0, np.int64)
        self._flying: deque[StepInFlight] = deque()

    def step_for(self, num_rows: int) -> DecodeStep:
        """The step for so many sequences, made at first use; what was under way is forgotten."""
        self.drain()
        bucket = self.decoder.bucket(num_rows)
        return self._captured(bucket, prefetch=self.decoder.prefetch)

    def _captured(self, bucket: int, *, prefetch: bool) -> DecodeStep:
        """With and without prefetching are two graphs over the same tensors."""
        steps, key = self.decoder.steps, (DecodeStep, bucket, prefetch)
        if key not in steps:
            other = steps.get((DecodeStep, bucket, not prefetch))
            experts = self.decoder.experts_for(bucket, prefetch=prefetch)
            if isinstance(other, DecodeStep):
                steps[key] = other.twin(experts)
            else:
                steps[key] = self._build(bucket, experts)
        step = steps[key]
        assert isinstance(step, DecodeStep)
        return step

    def _build(self, bucket: int, experts: ExpertsCall) -> DecodeStep:
        decoder = self.decoder
        cache = SharedCache(decoder.storage, decoder.config.num_hidden_layers)
        return DecodeStep(
            decoder.forward, decoder.config, cache, experts, batch=bucket,
            context=decoder.context, dtype=decoder.dtype, device=decoder.device,
            stream=decoder.captures,
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
        if more and self._runs_ahead:
            self._launch(step, num_rows, None)
        flight = self._flying.popleft()
        outcome = self._account(flight)
        if more:
            self._announce()
        seconds = time.perf_counter() - start
        self.decoder.stats.add_time("step", seconds)
        if self.decoder.trial is not None:
            self.decoder.trial.add(flight.step.experts.prefetches, seconds)
        return outcome

    @property
    def _runs_ahead(self) -> bool:
        """Whether a step can be scheduled before the routes of the last one are known."""
        return self.decoder.predictor_thread is not None or not self.decoder.device_cache.is_table

    def _launch(self, step: DecodeStep, num_rows: int, tokens_B: Tensor | None) -> None:
        """Enqueue one step and the copy of its outcome to the host."""
        if tokens_B is not None:
            self._tokens_B = tokens_B.cpu().numpy()
            padding = step.batch - num_rows
            step.ids_B1[:, 0] = torch.cat([tokens_B, tokens_B[-1:].expand(padding)])
        self._schedule()
        trial = self.decoder.trial
        if trial is not None and trial.prefetches():
            step = self._captured(step.batch, prefetch=True)
        self._flying.append(self.decoder.enqueue(step, num_rows))
        if tokens_B is not None:
            self._announce()

    def _schedule(self) -> None:
        """Bring the values on the device up to the step that is about to run."""
        decoder = self.decoder
        decoder.take_over()
        if decoder.predictor_thread is not None and decoder.predictor_thread.failure is None:
            decoder.predictor_thread.device_forecast.begin_step()
            return
        table = decoder.policy.table()
        if table is not None:
            decoder.device_cache.write_table(*table)

    def _announce(self) -> None:
        """Tell the predictor what runs now. The step is on its way already."""
        if self.decoder.predictor_thread is None:
            return
        request = PredictorRequest(
            self._tokens_B[:, None], self.positions_B[:, None], self.routes_LBK, False
        )
        self.decoder.predictor_thread.submit(request)
        self.positions_B = self.positions_B + 1

    def _account(self, flight: StepInFlight) -> ChosenTokens:
        """Wait for a step, and tell the recorder and the policy of it."""
        result = self.decoder.land(flight)
        if np.isnan(result.best_B).any():
            raise FloatingPointError(NOT_FINITE)
        self.routes_LBK = result.routes_LBK
        if self.decoder.route_log is not None:
            self.decoder.route_log.follow(self._tokens_B, result.routes_LBK.swapaxes(0, 1))
        self._tokens_B = result.tokens_B
        self._touch(result.routes_LBK)
        assert flight.step.logits_BV is not None
        return ChosenTokens(result.tokens_B.tolist(), flight.step.logits_BV[: flight.num_rows])

    def _touch(self, routes_LBK: np.ndarray) -> None:
        """Keep a table policy on the host up to date, where no predictor does."""
        decoder = self.decoder
        predicts = decoder.predictor_thread is not None and decoder.predictor_thread.failure is None
        if predicts or not decoder.device_cache.is_table:
            return
        decoder.policy.touch_routes(routes_LBK)
        if decoder.policy.needs_forecast:
            decoder.policy.begin_step(None)

    def drain(self) -> None:
        """Let steps that nobody asks for any more come to their end."""
        while self._flying:
            self._flying.pop().arrival.synchronize()
