"""What captured steps share: the books, the experts' kernels, the way to the device and back.

`generation` and `rows` are the two ways to use it: sequences that go on together, and any of many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from routing.topology import NO_EXPERT
from runtime.cache.policies import Policy
from runtime.cache.stats import Stats
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.experts_call import ExpertsCall, Ledger
from runtime.cuda.decode.graph_step import CapturedStep
from runtime.cuda.decode.predictor_thread import PredictorThread
from runtime.cuda.decode.prefetch_trial import PrefetchTrial
from runtime.cuda.kernels.custom_ops import DECODERS
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.prefill.streaming_pool import StreamingPool
from runtime.kv.static_cache import Storage
from runtime.prediction.route_log import RouteLog
from runtime.weights.source import Source

AUTO = "auto"
"""Let a `Trial` find out whether to prefetch."""
COMPILER: dict[str, str | int | bool | Callable[..., Any]] = {"coordinate_descent_tuning": True}
"""Makes the products of one token reductions of the compiler's own, at the memory's bandwidth."""
LARGEST_BATCH = 32
"""Sequences: beyond, decode kernels would compute more than they load."""


class StepInFlight(NamedTuple):
    """A step under way."""

    step: CapturedStep
    num_rows: int
    """Its sequences; rows beyond are padding."""
    outcome: Tensor
    """Pinned, complete when `arrival` is."""
    arrival: torch.cuda.Event


class StepResult(NamedTuple):
    """What a step that has ended gave, on the host: B tokens."""

    best_B: np.ndarray
    """float32, the highest logit."""
    tokens_B: np.ndarray
    """int64, the greedy choice."""
    routes_LBK: np.ndarray
    """int64, NO_EXPERT for none."""


class Decoder:
    """Captures and runs steps of `source`'s model. context, batch, prefetch, compile: see
    `runtime.load`.
    """

    def __init__(
        self,
        source: Source,
        layout: KernelLayout,
        pool: StreamingPool,
        host: PinnedExperts,
        policy: Policy,
        stats: Stats,
        routers: list[nn.Module | None],
        *,
        context: int,
        batch: int,
        prefetch: bool | str,
        compile: bool,
    ) -> None:
        model: Any = source.model
        self.model = model
        self.config: Any = model.config.get_text_config(decoder=True)
        self._layout, self._pool, self._host = layout, pool, host
        self.policy, self.stats = policy, stats
        self.context, self.batch = context, min(batch, LARGEST_BATCH)
        self.prefetch = prefetch is True
        """Whether every step prefetches."""
        self.trial = PrefetchTrial() if prefetch == AUTO and not stats.all_fit else None
        self._routers = routers
        self._top_k = max(layer.top_k for layer in source.layers)
        self.device_cache = DeviceCache(pool.cache, len(source.layers), pool.device)
        self.predictor_thread: PredictorThread | None = None
        self.route_log: RouteLog | None = None
        self.storage = Storage(batch, context)
        self.steps: dict[Hashable, CapturedStep] = {}
        self.forward: Any = model.forward
        if compile:
            self.forward = torch.compile(model.forward, options=COMPILER)
        self._running: ExpertsCall | None = None
        self._spare: defaultdict[int, list[Tensor]] = defaultdict(list)
        """Pinned memory of outcomes, by the batch of their steps."""
        self._num_free = 0
        self.captures = torch.cuda.Stream(pool.device)  # cuBLAS keeps a workspace for each stream
        DECODERS[id(model)] = self

    def bucket(self, num_rows: int) -> int:
        """Rows of the captured step that serves so many sequences."""
        return next(size for size in _buckets(self.batch) if size >= num_rows)

    def most_experts(self, num_rows: int) -> int:
        """Slots that one layer's call of so many sequences can need."""
        return min(self.device_cache.num_experts, self.bucket(num_rows) * self._top_k)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the model."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return self._pool.device

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return self._pool.num_slots

    def experts_for(self, bucket: int, *, prefetch: bool) -> ExpertsCall:
        """What the expert layers of a captured step of so many tokens call."""
        thread, pool = self.predictor_thread, self._pool
        return ExpertsCall(
            bucket, self._top_k, self._layout, pool.expert_block, pool.slots_SN, self._host,
            self.device_cache, prefetch=prefetch, routers=self._routers,
            forecast=None if thread is None else thread.device_forecast.likely,
        )  # fmt: skip

    def enqueue(self, step: CapturedStep, num_rows: int) -> StepInFlight:
        """Enqueue a step, whose values are on the device, and the copy of its outcome to here."""
        self._replay(step)
        assert step.outcome is not None
        spares = self._spare[step.batch]
        pinned = spares.pop() if spares else pinned_like(step.outcome)
        pinned.copy_(step.outcome, non_blocking=True)
        return StepInFlight(step, num_rows, pinned, torch.cuda.current_stream().record_event())

    def land(self, flight: StepInFlight) -> StepResult:
        """Wait for a step, count what it did."""
        step, num_rows = flight.step, flight.num_rows
        flight.arrival.synchronize()
        outcome = flight.outcome.numpy().copy()
        self._spare[step.batch].append(flight.outcome)
        ledger = step.experts.read(outcome[2 * step.batch :])
        self._count(ledger, num_rows, prefetched=step.experts.prefetches)
        routes_LBK = ledger.routes_LBK[:, :num_rows].astype(np.int64)
        return StepResult(
            outcome[:num_rows].view(np.float32),
            outcome[step.batch : step.batch + num_rows].astype(np.int64),
            np.where(routes_LBK < self.device_cache.num_experts, routes_LBK, NO_EXPERT),
        )

    def _replay(self, step: CapturedStep) -> None:
        self._running = step.experts
        try:
            step()
        except torch.OutOfMemoryError as error:
            self.steps.clear()
            torch.cuda.empty_cache()
            raise ValueError(
                "the GPU has no memory left for a captured step; give a smaller memory=, context= "
                "or batch="
            ) from error
        finally:
            self._running = None

    def take_over(self) -> None:
        """Make the device's books the truth, if they are not."""
        if not self.device_cache.on_device:
            self._pool.wait_for_copies()
            self.device_cache.upload()
            self._num_free = self._pool.num_slots - self._pool.cache.num_resident

    def _count(self, ledger: Ledger, num_rows: int, *, prefetched: bool) -> None:
        was_early_L = (ledger.prefetched_L >= 0) & (ledger.used_L > 0)
        num_missed_L = ledger.num_fetched_L - was_early_L
        link_bytes = self._host.link_bytes(0)
        num_missed = int(num_missed_L.sum())
        self.stats.evictions += max(num_missed - self._num_free, 0)
        self._num_free = max(self._num_free - num_missed, 0)
        self.stats.count_step(ledger.num_used_L, num_missed_L, link_bytes, num_rows)
        if prefetched:
            share_L = ledger.chunks_L / self._pool.expert_block.num_chunks
            chosen_L = ledger.prefetched_L >= 0
            self.stats.count_prefetch(share_L, was_early_L, chosen_L, link_bytes)

    def call(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts call of a layer inside a captured step, also while it is being compiled."""
        if torch.compiler.is_compiling():
            return torch.ops.expertflow.experts(x, ids, weights, id(self.model), index)
        return self.run_layer(index, x, ids, weights)

    def run_layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The kernels of an experts call: x [B, H], ids and weights [B, K]."""
        assert self._running is not None
        return self._running(index, x, ids, weights)

    @property
    def is_running(self) -> bool:
        """Whether the model's forward runs as (the capture of) a decode step right now."""
        return self._running is not None

    def close(self) -> None:
        """Give back graphs, buffers and the predictor's thread."""
        if self.predictor_thread is not None:
            self.predictor_thread.close()
        self.steps.clear()
        self.storage = Storage(self.storage.batch, self.context)
        self.forward = None


def pinned_like(tensor: Tensor) -> Tensor:
    """A pinned tensor on the host, of the same shape."""
    return torch.empty_like(tensor, device="cpu").pin_memory()


def _buckets(batch: int) -> list[int]:
    """Powers of two up to `batch`, and `batch`."""
    return sorted({min(2**power, batch) for power in range(LARGEST_BATCH.bit_length())})
