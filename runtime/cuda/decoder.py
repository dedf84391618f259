"""Running captured decode steps: predict, schedule, run, account."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from routing.topology import NO_EXPERT
from runtime.cuda.books import Books
from runtime.cuda.experts import ExpertsCall, Ledger
from runtime.cuda.host import HostTier
from runtime.cuda.kv import SharedCache, Storage
from runtime.cuda.layout import Layout
from runtime.cuda.op import DECODERS
from runtime.cuda.oracle import Job, Oracle
from runtime.cuda.step import DecodeStep
from runtime.cuda.streamed import StreamedPool
from runtime.loader import Source
from runtime.policies import Policy
from runtime.recorder import Recorder
from runtime.stats import Stats

LARGEST_BATCH = 32
"""Sequences: beyond, decode kernels would compute more than they load."""


NOT_FINITE = "the model's logits are NaN: a weight or an activation is not finite"


class Outcome(NamedTuple):
    """What a step gave."""

    tokens_B: list[int]
    """The greedy choice."""
    logits_BV: Tensor


class Decoder:
    """The captured steps of `source`'s model, one for each batch size that was asked for.

    context, batch, prefetch, compile: see `runtime.load`.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        pool: StreamedPool,
        host: HostTier,
        policy: Policy,
        stats: Stats,
        routers: list[nn.Module | None],
        *,
        context: int,
        batch: int,
        prefetch: bool,
        compile: bool,
    ) -> None:
        model: Any = source.model
        self._model = model
        self._config: Any = model.config.get_text_config(decoder=True)
        self._layout, self._pool, self._host = layout, pool, host
        self._policy, self._stats = policy, stats
        self.context, self.batch = context, min(batch, LARGEST_BATCH)
        self._prefetch, self._routers = prefetch, routers
        self._top_k = max(layer.top_k for layer in source.layers)
        self.books = Books(pool.cache, len(source.layers), pool.device)
        self.oracle: Oracle | None = None
        self.recorder: Recorder | None = None
        self.routes_LBK: np.ndarray | None = None
        """True routes of each sequence's last token, int64."""
        self.positions_B: np.ndarray = np.zeros(0, np.int64)
        """Of the tokens that run next."""
        self._storage = Storage(self.batch, context)
        self._steps: dict[int, DecodeStep] = {}
        self._forward: Any = torch.compile(model.forward) if compile else model.forward
        self._running: ExpertsCall | None = None
        self._flying: deque[tuple[DecodeStep, int, Tensor, torch.cuda.Event]] = deque()
        """Steps under way: each with its sequences, and the host's copy of its outcome."""
        self._spare: list[Tensor] = []
        self._num_free = 0
        self._captures = torch.cuda.Stream(pool.device)  # cuBLAS keeps a workspace for each stream
        DECODERS[id(model)] = self

    def step_for(self, num_rows: int) -> DecodeStep:
        """The step for so many sequences, made at first use; what was under way is forgotten."""
        self.drain()
        self._spare.clear()  # outcomes of another batch size are of another length
        bucket = self._bucket(num_rows)
        if bucket not in self._steps:
            self._steps[bucket] = self._build(bucket)
        return self._steps[bucket]

    def _bucket(self, num_rows: int) -> int:
        return next(size for size in _buckets(self.batch) if size >= num_rows)

    def most_experts(self, num_rows: int) -> int:
        """Slots that one layer's call of so many sequences can need."""
        return min(self.books.num_experts, self._bucket(num_rows) * self._top_k)

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return self._pool.num_slots

    def _build(self, bucket: int) -> DecodeStep:
        experts = ExpertsCall(
            bucket, self._top_k, self._layout, self._pool.record, self._pool.slots_SN, self._host,
            self.books, prefetch=self._prefetch, routers=self._routers,
            forecast=None if self.oracle is None else self.oracle.likely,
        )  # fmt: skip
        return DecodeStep(
            self._forward, self._config, SharedCache(self._storage, self._config.num_hidden_layers),
            experts, batch=bucket, context=self.context, dtype=self._model.dtype,
            device=self._pool.device, stream=self._captures,
        )  # fmt: skip

    def run(
        self, step: DecodeStep, num_rows: int, tokens_B: Tensor | None, more: bool = False
    ) -> Outcome:
        """Predict, schedule, run, account: one decode step, for the given tokens [B] or for those
        that the last step chose by itself.

        more: another such step follows. It is enqueued at once, and runs while this one is
        accounted for.
        """
        start = time.perf_counter()
        if not self._flying:
            self._launch(step, num_rows, tokens_B)
        if more and self._runs_ahead:
            self._launch(step, num_rows, None)
        outcome = self._account(*self._flying.popleft())
        if more:
            self._announce()
        self._stats.add_time("step", time.perf_counter() - start)
        return outcome

    @property
    def _runs_ahead(self) -> bool:
        """Whether a step can be scheduled before the routes of the last one are known."""
        return self.oracle is not None or not self.books.is_table

    def _launch(self, step: DecodeStep, num_rows: int, tokens_B: Tensor | None) -> None:
        """Enqueue one step and the copy of its outcome to the host."""
        if tokens_B is not None:
            self._tokens_B = tokens_B.cpu().numpy()
            padding = len(step.ids_B1) - num_rows
            step.ids_B1[:, 0] = torch.cat([tokens_B, tokens_B[-1:].expand(padding)])
        self._schedule()
        self._replay(step)
        assert step.outcome is not None
        pinned = self._spare.pop() if self._spare else pinned_like(step.outcome)
        pinned.copy_(step.outcome, non_blocking=True)
        arrival = torch.cuda.current_stream().record_event()
        self._flying.append((step, num_rows, pinned, arrival))
        if tokens_B is not None:
            self._announce()

    def _replay(self, step: DecodeStep) -> None:
        self._running = step.experts
        try:
            step()
        except torch.OutOfMemoryError as error:
            self._steps.clear()
            torch.cuda.empty_cache()
            raise ValueError(
                "the GPU has no memory left for a captured step; give a smaller memory=, context= "
                "or batch="
            ) from error
        finally:
            self._running = None

    def drain(self) -> None:
        """Let steps that nobody asks for any more come to their end."""
        while self._flying:
            *_, arrival = self._flying.pop()
            arrival.synchronize()

    def _schedule(self) -> None:
        """Bring the values on the device up to the step that is about to run."""
        if not self.books.on_device:
            self._pool.settle()
            self.books.upload()
            self._num_free = self._pool.num_slots - self._pool.cache.num_resident
        if self.oracle is not None and self.oracle.failure is None:
            self.oracle.begin_step()
            return
        table = self._policy.table()
        if table is not None:
            self.books.write_table(*table)

    def _announce(self) -> None:
        """Tell the predictor what runs now. The step is on its way already."""
        if self.oracle is None:
            return
        job = Job(self._tokens_B[:, None], self.positions_B[:, None], self.routes_LBK, False)
        self.oracle.submit(job)
        self.positions_B = self.positions_B + 1

    def _account(
        self, step: DecodeStep, num_rows: int, pinned: Tensor, arrival: torch.cuda.Event
    ) -> Outcome:
        """Wait for a step, count what it did."""
        assert step.logits_BV is not None
        arrival.synchronize()
        outcome, bucket = pinned.numpy().copy(), len(step.ids_B1)
        self._spare.append(pinned)
        best_B = outcome[:num_rows].view(np.float32)
        if np.isnan(best_B).any():
            raise FloatingPointError(NOT_FINITE)
        tokens_B = outcome[bucket : bucket + num_rows]
        ledger = step.experts.read(outcome[2 * bucket :])
        self._count(ledger, num_rows)
        self.routes_LBK = np.where(
            ledger.routes_LBK < self.books.num_experts, ledger.routes_LBK, NO_EXPERT
        )[:, :num_rows].astype(np.int64)
        if self.recorder is not None:
            self.recorder.follow(self._tokens_B, self.routes_LBK.swapaxes(0, 1))
        self._tokens_B = tokens_B.astype(np.int64)
        if self.oracle is None or self.oracle.failure is not None:
            self._touch(self.routes_LBK)
        return Outcome(tokens_B.tolist(), step.logits_BV[:num_rows])

    def _touch(self, routes_LBK: np.ndarray) -> None:
        """Keep a table policy on the host up to date, where no predictor does."""
        if not self.books.is_table:
            return
        self._policy.touch_routes(routes_LBK)
        if self._policy.needs_forecast:
            self._policy.begin_step(None)

    def _count(self, ledger: Ledger, num_rows: int) -> None:
        was_early_L = (ledger.prefetched_L >= 0) & (ledger.used_L > 0)
        num_missed_L = ledger.num_fetched_L - was_early_L
        link_bytes = self._host.link_bytes(0)
        num_missed = int(num_missed_L.sum())
        self._stats.evictions += max(num_missed - self._num_free, 0)
        self._num_free = max(self._num_free - num_missed, 0)
        self._stats.count_step(ledger.num_used_L, num_missed_L, link_bytes, num_rows)
        if self._prefetch:
            share_L = ledger.chunks_L / self._pool.record.num_chunks
            chosen_L = ledger.prefetched_L >= 0
            self._stats.count_prefetch(share_L, was_early_L, chosen_L, link_bytes)

    def call(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts call of a layer inside a captured step, also while it is being compiled."""
        if torch.compiler.is_compiling():
            return torch.ops.expertflow.experts(x, ids, weights, id(self._model), index)
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
        self.drain()
        if self.oracle is not None:
            self.oracle.close()
        self._steps.clear()
        self._storage = Storage(self.batch, self.context)
        self._forward = None


def pinned_like(tensor: Tensor) -> Tensor:
    """A pinned tensor on the host, of the same shape."""
    return torch.empty_like(tensor, device="cpu").pin_memory()


def _buckets(batch: int) -> list[int]:
    """Powers of two up to `batch`, and `batch`."""
    return sorted({min(2**power, batch) for power in range(LARGEST_BATCH.bit_length())})
