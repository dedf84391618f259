"""The predictor beside the steps: a thread that turns tokens and routes into values on the device.

A step never waits for it. Whatever arrives while the step runs serves its later layers; what comes
too late serves the next. When the predictor raises or stays silent, the steps go on without it.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from routing.topology import NO_EXPERT
from runtime.cuda.books import Books
from runtime.forecaster import Forecaster
from runtime.policies import Forecast, Policy
from runtime.stats import Stats

SILENT_AFTER = 1.0
"""Seconds without an answer after which the predictor counts as hanging."""
MOST_WAITING = 8
"""Tokens: a predictor further behind than this is slower than the model and is given up."""


class Job(NamedTuple):
    """What the predictor is told about: the tokens about to run, and what the last step used."""

    token_ids_BT: np.ndarray
    positions_BT: np.ndarray
    routes_LBK: np.ndarray | None
    is_new: bool
    """Whether new sequences start with these tokens."""


class Oracle:
    """Owns the forecaster, and moves the policy on while steps run captured."""

    def __init__(
        self,
        forecaster: Forecaster,
        policy: Policy,
        books: Books,
        stats: Stats,
    ) -> None:
        self._forecaster, self._policy, self._books = forecaster, policy, books
        self._stats = stats
        self.failure: str | None = None
        device = books.clock.device
        keys = len(books.before)
        self.likely = torch.zeros(keys, dtype=torch.float32, device=device)
        self._table_host = torch.zeros(2, keys, dtype=torch.float64).pin_memory()
        self._likely_host = torch.zeros(keys, dtype=torch.float32).pin_memory()
        self._stream = torch.cuda.Stream(device)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="expertflow-oracle", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand over what is known; returns at once."""
        if self.failure is None and self._overdue():
            self.failure = f"the predictor did not answer for {SILENT_AFTER:g} s"
        if self.failure is None and self._jobs.qsize() > MOST_WAITING:
            self.failure = f"the predictor fell {MOST_WAITING} tokens behind the model"
        if self.failure is None:
            self._idle.clear()
            self._jobs.put(job)

    def _overdue(self) -> bool:
        since = self._busy_since
        return since is not None and time.perf_counter() - since > SILENT_AFTER

    def wait(self) -> None:
        """Wait until everything submitted is done, or the predictor is given up."""
        deadline = time.perf_counter() + SILENT_AFTER * (1 + self._jobs.qsize())
        while self.failure is None and not self._idle.wait(0.05):
            if time.perf_counter() > deadline:
                self.failure = f"the predictor did not answer for {SILENT_AFTER:g} s"

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._jobs.put(None)
        self._thread.join(SILENT_AFTER)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._busy_since = time.perf_counter()
            try:
                self._answer(job)
            except Exception as error:
                self.failure = f"the predictor failed: {type(error).__name__}: {error!s:.200}"
            finally:
                self._busy_since = None
                if self._jobs.empty():
                    self._idle.set()

    def _answer(self, job: Job) -> None:
        start = time.perf_counter()
        if job.is_new or len(job.token_ids_BT) != self._forecaster.batch_size:
            self._forecaster.reset(len(job.token_ids_BT))
        elif job.routes_LBK is not None:
            self._learn(job.routes_LBK)
        forecast = self._forecaster.forecast(job.token_ids_BT, job.positions_BT)
        self._policy.begin_step(forecast)
        self._publish(forecast)
        self._stats.add_time("predict", time.perf_counter() - start)

    def _learn(self, routes_LBK: np.ndarray) -> None:
        """The true routes of the last step: for the predictor's input, the policy's memory and the
        count of the recall.
        """
        for layer, routes_BK in enumerate(routes_LBK):
            used = np.unique(routes_BK)
            self._policy.touch(layer, used[used != NO_EXPERT])
        routes_BLK = np.ascontiguousarray(routes_LBK.swapaxes(0, 1))
        self._forecaster.observe(routes_BLK)
        if self._forecaster.this_BLE is not None:
            self._stats.count_recall(self._forecaster.this_BLE, routes_BLK)

    def _publish(self, forecast: Forecast) -> None:
        table = self._policy.table()
        assert table is not None
        self._stream.synchronize()  # the last copy has left the pinned memory
        self._table_host[0].copy_(torch.from_numpy(table[0]))
        self._table_host[1].copy_(torch.from_numpy(table[1]))
        self._likely_host.copy_(torch.from_numpy(forecast.this_LE.reshape(-1)))
        with torch.cuda.stream(self._stream):
            self._send(self._books.before, self._table_host[0])
            self._send(self._books.after, self._table_host[1])
            self._send(self.likely, self._likely_host)

    def _send(self, to: Tensor, pinned: Tensor) -> None:
        to.copy_(pinned, non_blocking=True)
