"""The decoder: it runs captured steps and counts what they did.

`batch_decoder` and `row_decoder` are the two ways to use it: sequences that are generated together,
and any rows of the key/value cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from routing.topology import NO_EXPERT
from runtime.cache.stats import Stats
from runtime.cuda.decode.captured_model import CapturedModel
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.experts.blocks import Blocks
from runtime.cuda.decode.experts.experts_call import ExpertsCall
from runtime.cuda.decode.experts.ledger import Ledger
from runtime.cuda.decode.experts.ranges import Range, choose_ranges, most_used
from runtime.cuda.decode.graph_step import CapturedStep, StepExperts
from runtime.cuda.decode.policy_driver import PolicyDriver
from runtime.cuda.kernels.custom_ops import running
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.prefetching import Prefetching
from runtime.cuda.prefill.streaming_pool import StreamingPool
from runtime.cuda.share.cpu_share import CpuShare
from runtime.engine.guards.changes import fingerprint, uncapturable
from runtime.kv.state_kinds import unsupported


class StepInFlight(NamedTuple):
    """A step that was enqueued."""

    step: CapturedStep
    num_rows: int
    """Its sequences; further rows are padding."""
    outcome: Tensor
    """Pinned; complete when `arrival` is."""
    arrival: torch.cuda.Event


class StepResult:
    """The result of a finished step of B tokens, on the host."""

    def __init__(
        self, best_B: np.ndarray, tokens_B: np.ndarray, ledger: Ledger, num_experts: int
    ) -> None:
        self.best_B = best_B
        """float32, the highest logit."""
        self.tokens_B = tokens_B
        """int64, the greedy choice."""
        self.ledger = ledger
        """What the experts calls did, for `Decoder.count`."""
        self._num_experts = num_experts

    @property
    def chosen_LBK(self) -> np.ndarray:
        """int32, as the routers chose: what is no number of an expert is none."""
        return self.ledger.routes_LBK[:, : len(self.tokens_B)]

    @cached_property
    def routes_LBK(self) -> np.ndarray:
        """int64, NO_EXPERT for none."""
        chosen_LBK = self.chosen_LBK
        routes_LBK = chosen_LBK.astype(np.int64)
        is_none_LBK = chosen_LBK >= self._num_experts
        if is_none_LBK.any():
            routes_LBK[is_none_LBK] = NO_EXPERT
        return routes_LBK

    def routes_BLK(self) -> np.ndarray:
        """The same, token by token."""
        return self.routes_LBK.swapaxes(0, 1)


class Decoder:
    """Runs captured steps of `model` over the slots of `pool`.

    routers: of each layer, to look one layer ahead; None where none was found. share: the CPU's of
    missed experts, None for none.
    """

    def __init__(
        self,
        model: CapturedModel,
        layout: KernelLayout,
        pool: StreamingPool,
        host: PinnedExperts,
        device_cache: DeviceCache,
        driver: PolicyDriver,
        prefetching: Prefetching,
        stats: Stats,
        routers: list[nn.Module | None],
        share: CpuShare | None = None,
    ) -> None:
        self.model, self.driver, self.prefetching, self.stats = model, driver, prefetching, stats
        self._share = share
        self._layout, self._pool, self._host = layout, pool, host
        self._device_cache, self._routers = device_cache, routers
        self.steps: dict[Hashable, CapturedStep] = {}
        """The steps captured so far."""
        self._running: StepExperts | None = None
        self._spare: defaultdict[int, list[Tensor]] = defaultdict(list)
        """Pinned memory of outcomes, by the batch of their steps."""
        self._num_free = 0
        self._captured: Hashable = None
        """The fingerprint of the model whose steps were captured."""

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return self._pool.num_slots

    def objection(self) -> str | None:
        """Why captured steps would not do what the model does now; None: they would."""
        model = self.model.model
        if (reason := uncapturable(model) or unsupported(self.model.config)) is not None:
            return reason
        now = fingerprint(model)
        self._captured = self._captured or now
        return None if now == self._captured else "it was changed since steps were captured"

    def most_experts(self, num_rows: int) -> int:
        """Slots that a step of so many sequences can need at once."""
        bucket = self.model.bucket(num_rows)
        return most_used(self._ranges(bucket), bucket * self.model.top_k)

    def _ranges(self, bucket: int) -> list[Range]:
        """The ranges of experts in which the calls of such a step run."""
        cache, block = self._device_cache, self._pool.expert_block
        parts = Blocks.of(bucket, self._layout, block).parts
        most_routed = bucket * self.model.top_k
        return choose_ranges(
            cache.num_experts, parts, most_routed, num_keys=self.stats.total_experts,
            num_slots=self.num_slots, block_bytes=2 * block.stored_units,
        )  # fmt: skip

    def experts_call(self, bucket: int, *, prefetch: bool) -> ExpertsCall:
        """The experts calls of a captured step of `bucket` tokens."""
        pool = self._pool
        return ExpertsCall(
            bucket, self.model.top_k, self._layout, pool.expert_block, pool.slots_SN, self._host,
            self._device_cache, prefetch=prefetch, resident=self.stats.all_fit,
            num_ranges=len(self._ranges(bucket)), routers=self._routers,
            chances=self.driver.likely, order=None if self._share is None else self._share.order,
        )  # fmt: skip

    # ------------------------------------------------------------------ a step

    def take_over(self) -> None:
        """Make the device's slot table the truth, if it is not.

        Where every expert has a slot, the missing ones are brought first: steps fetch nothing.
        """
        if not self._device_cache.on_device:
            if self.stats.all_fit:
                self._pool.fill()
            self._pool.wait_for_copies()
            self._device_cache.upload()
            self._num_free = self._pool.num_slots - self._pool.cache.num_resident

    def hand_over(self) -> None:
        """Make the host's slot table the truth: what runs next does not plan on the device."""
        self.rest()
        self._device_cache.download()

    def enqueue(self, step: CapturedStep, num_rows: int) -> StepInFlight:
        """Enqueue a step, whose values are on the device, and the copy of its outcome to here."""
        if self._share is not None and step.batch == 1:
            assert isinstance(step.experts, ExpertsCall)
            self._share.begin_step(step.experts)
        if step.experts.prefetches:
            self._device_cache.has_parts = True
        else:
            self._device_cache.drop_parts()
        self._replay(step)
        assert step.outcome is not None
        spares = self._spare[step.batch]
        pinned = spares.pop() if spares else pinned_like(step.outcome)
        pinned.copy_(step.outcome, non_blocking=True)
        return StepInFlight(step, num_rows, pinned, torch.cuda.current_stream().record_event())

    def finish(self, flight: StepInFlight) -> StepResult:
        """Wait for a step."""
        step, num_rows = flight.step, flight.num_rows
        flight.arrival.synchronize()
        outcome = flight.outcome.numpy().copy()
        self._spare[step.batch].append(flight.outcome)
        return StepResult(
            outcome[:num_rows].view(np.float32),
            outcome[step.batch : step.batch + num_rows].astype(np.int64),
            step.experts.read(outcome[2 * step.batch :]),
            self._device_cache.num_experts,
        )

    def count_time(self, flight: StepInFlight, kind: str, seconds: float) -> None:
        """Note how long a step of a kind (of `prefetching`) took."""
        self.stats.add_time("step", seconds)
        self.prefetching.count_step(kind, flight.step.experts.prefetches, seconds)
        if self._share is not None and flight.step.batch == 1:
            self._share.count_step(seconds)

    def rest(self) -> None:
        """Other passes come: the CPU's share leaves them the cores."""
        if self._share is not None:
            self._share.rest()

    def forget(self, flight: StepInFlight) -> None:
        """Wait for a step whose result nobody wants any more."""
        flight.arrival.synchronize()
        if self._share is not None:
            self._share.forget()

    def _replay(self, step: CapturedStep) -> None:
        self._running = step.experts
        try:
            with running(self):
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

    def count(self, flight: StepInFlight, ledger: Ledger) -> None:
        """Count what a finished step did."""
        moved, block = ledger.moved, self._pool.expert_block
        num_brought_L = ledger.num_fetched_L - moved.late_L
        link_bytes = self._host.link_bytes(0)
        num_taken = int(num_brought_L.sum()) + moved.begun
        self.stats.evictions += max(num_taken - self._num_free, 0)
        self._num_free = max(self._num_free - num_taken, 0)
        self.stats.count_step(
            ledger.num_used_L, num_brought_L, link_bytes, flight.num_rows, ledger.num_away_L
        )
        if flight.step.experts.prefetches:
            chunk_bytes = link_bytes // block.num_chunks
            self.stats.count_prefetches(
                moved.late_L, begun=moved.begun, whole=moved.whole,
                bytes_sent=moved.brought * chunk_bytes, bytes_late=moved.lacked * chunk_bytes,
                bytes_wasted=moved.wasted * chunk_bytes,
            )  # fmt: skip

    # ------------------------------------------------------------------ inside a step

    @property
    def is_running(self) -> bool:
        """Whether the model's forward runs as (the capture of) a decode step right now."""
        return self._running is not None

    def run_layer(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The kernels of an experts call: x [B, H], ids and weights [B, K]."""
        assert self._running is not None
        return self._running(index, x, ids, weights)

    def close(self) -> None:
        """Free graphs and buffers, and end the predictor's thread."""
        self.driver.close()
        self.steps.clear()
        if self._share is not None:
            self._share.close()
        self.model.close()


def pinned_like(tensor: Tensor) -> Tensor:
    """A pinned tensor on the host, of the same shape."""
    return torch.empty_like(tensor, device="cpu").pin_memory()
