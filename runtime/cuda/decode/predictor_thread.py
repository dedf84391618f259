"""The predictor thread: it turns tokens and routes into values on the device, beside the steps.

A step never waits for it. Whatever arrives while the step runs serves its later layers; what comes
too late serves the next. When the predictor raises or stays silent, the steps go on without it.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.cache.forecast import Forecast
from runtime.cache.policy import Policy
from runtime.cache.stats import Stats
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.prediction.forecaster import Forecaster

SILENT_AFTER = 2.0
"""Seconds without an answer after which the predictor counts as hanging..."""
SILENT_PER_TOKEN = 0.01
"""... and so many more for each token that it was asked about."""


class PredictorRequest(NamedTuple):
    """A question to the predictor: the tokens about to run, and the routes of the last step."""

    token_ids_BT: np.ndarray
    positions_BT: np.ndarray
    routes_LBK: np.ndarray | None
    is_new: bool
    """Whether new sequences start with these tokens."""
    has_begun: bool = False
    """Whether the policy has begun this step already: it is a pass outside of captured steps."""

    @property
    def num_rows(self) -> int:
        """B, the sequences."""
        return len(self.token_ids_BT)


class DeviceForecast:
    """The last forecast, on the device: values in the device cache, and probabilities of use."""

    def __init__(self, device_cache: DeviceCache) -> None:
        device, keys = device_cache.clock.device, len(device_cache.before)
        self._device_cache = device_cache
        self.chances = torch.zeros(2, keys, dtype=torch.float32, device=device)
        """Of use in the running step, and in the one after it."""
        self._values_host = torch.zeros(2, keys, dtype=torch.float64).pin_memory()
        self._chances_host = torch.zeros(2, keys, dtype=torch.float32).pin_memory()
        self._stream = torch.cuda.Stream(device)
        self._sent = self._stream.record_event()

    def begin_step(self) -> None:
        """Start a step with what the last forecast said of the step after its own."""
        self._device_cache.before.copy_(self._device_cache.after)
        self.chances[0].copy_(self.chances[1])

    def write(self, policy: Policy, forecast: Forecast) -> None:
        """Write values and probabilities for the steps that are enqueued from here on."""
        table = policy.table()
        assert table is not None
        self._device_cache.write_table(*table)
        chances = forecast.this_LE, forecast.next_LE
        for chances_LE, tensor in zip(chances, self.chances, strict=True):
            tensor.copy_(torch.from_numpy(chances_LE.reshape(-1)), non_blocking=True)

    def publish(self, policy: Policy, forecast: Forecast) -> None:
        """Send the probabilities and values, without waiting for the step that reads them."""
        self.publish_chances(forecast)
        self.publish_values(policy)

    def publish_chances(self, forecast: Forecast) -> None:
        """Send the probabilities alone: what to prefetch is known before what to keep."""
        self._sent.synchronize()  # the last copies have left the pinned memory
        self._chances_host.numpy()[:] = [row.reshape(-1) for row in forecast[:2]]
        self._send(self.chances, self._chances_host)

    def publish_values(self, policy: Policy) -> None:
        """Send the values alone."""
        table = policy.table()
        assert table is not None
        self._values_host.numpy()[:] = table
        self._send(self._device_cache.table, self._values_host)

    def _send(self, tensor: Tensor, host: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            tensor.copy_(host, non_blocking=True)
        self._sent = self._stream.record_event()


class PredictorThread:
    """Owns the forecaster, and moves the policy on while steps run captured."""

    def __init__(
        self,
        forecaster: Forecaster,
        policy: Policy,
        device_cache: DeviceCache,
        stats: Stats,
    ) -> None:
        self._forecaster, self._policy, self._stats = forecaster, policy, stats
        self.failure: str | None = None
        self.device_forecast = DeviceForecast(device_cache)
        self._requests: queue.SimpleQueue[PredictorRequest | None] = queue.SimpleQueue()
        self._deadline = math.inf
        self._learning = ThreadPoolExecutor(1, "expertflow-learning")
        self._thread = threading.Thread(target=self._work, name="expertflow-predictor", daemon=True)
        self._thread.start()

    def submit(self, request: PredictorRequest) -> None:
        """Ask for a prediction; returns at once."""
        if self.failure is None and time.perf_counter() > self._deadline:
            self.failure = f"the predictor has not answered for over {SILENT_AFTER:g} s"
        if self.failure is None:
            self._requests.put(request)

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._requests.put(None)
        self._thread.join(SILENT_AFTER)
        self._learning.shutdown(wait=not self._thread.is_alive())

    def _work(self) -> None:
        while self.failure is None and (requests := self._take()):
            num_tokens = sum(request.token_ids_BT.size for request in requests)
            self._deadline = time.perf_counter() + SILENT_AFTER + SILENT_PER_TOKEN * num_tokens
            try:
                self._answer(requests)
            except Exception as error:  # a broken predictor must not stop the model
                self.failure = f"the predictor failed: {type(error).__name__}: {error!s:.200}"
            self._deadline = math.inf

    def _take(self) -> list[PredictorRequest]:
        """All waiting requests, from the start of the newest sequences on; empty at the end."""
        waiting = [self._requests.get()]
        while not self._requests.empty():
            waiting.append(self._requests.get())
        ended = None in waiting
        requests = [] if ended else [request for request in waiting if request is not None]
        starts = [
            index for index, request in enumerate(requests)
            if request.is_new or request.num_rows != requests[index - 1].num_rows
        ]  # fmt: skip
        return requests[starts[-1] :] if starts else requests

    def _answer(self, requests: list[PredictorRequest]) -> None:
        """Predict for all tokens of `requests` in one run: several where the model was faster.

        The step runs meanwhile, so all that can wait does: the policy and the memory learn from the
        last routes beside the predictor's run, and the last prediction is scored after this one
        was sent. Its probabilities are sent first: prefetching needs neither memory nor policy.
        """
        start = time.perf_counter()
        tokens_BT = np.concatenate([request.token_ids_BT for request in requests], 1)
        positions_BT = np.concatenate([request.positions_BT for request in requests], 1)
        scored = self._inform(requests[0], len(tokens_BT))
        learned = self._learning.submit(self._learn, requests, tokens_BT, positions_BT)
        try:
            forecast = self._forecaster.predict(tokens_BT, positions_BT)
            if self.failure is None:  # it may have been given up meanwhile
                self.device_forecast.publish_chances(forecast)
        finally:
            learned.result()  # nobody else moves the policy before
        forecast = forecast._replace(remembered=self._forecaster.recall())
        if self.failure is None:
            begun = requests[-1].has_begun
            (self._policy.revise if begun else self._policy.begin_step)(forecast)
            self.device_forecast.publish_values(self._policy)
        self._stats.add_time("predict", time.perf_counter() - start)
        if scored is not None:
            self._stats.count_recall(*scored)

    def _learn(
        self,
        requests: Sequence[PredictorRequest],
        tokens_BT: np.ndarray,
        positions_BT: np.ndarray,
    ) -> None:
        """A pass that has begun learns from its own touches; the step before it is past."""
        for request in requests:
            is_over = request.is_new or request.has_begun
            if not is_over and request.routes_LBK is not None:
                self._policy.touch_routes(request.routes_LBK)
        self._forecaster.look_up(tokens_BT, positions_BT)

    def _inform(
        self, request: PredictorRequest, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Give the predictor the routes of the last step.

        Returns what was predicted for that step, logits [B, L, E], and the routes [B, L, K].
        """
        if request.is_new or batch_size != self._forecaster.batch_size:
            self._forecaster.reset(batch_size)
        elif request.routes_LBK is not None and request.routes_LBK.shape[1] == batch_size:
            routes_BLK = np.ascontiguousarray(request.routes_LBK.swapaxes(0, 1))
            self._forecaster.observe(routes_BLK)
            if self._forecaster.this_BLE is not None and request.token_ids_BT.shape[1] == 1:
                return self._forecaster.this_BLE, routes_BLK
        return None
