"""One layer's experts call, in kernels: plan, gate and up, down; prefetch beside them.

A call of several tokens may run in ranges of experts, each planned and run out of the slots that
those before it leave (`ranges`).

Everything is enqueued on the current stream without a host sync, so that it can be captured. What
the host wants to know of a step is written to one tensor, the ledger. Where every expert has a
slot, nothing is planned for and nothing fetched.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor, nn

from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.experts.blocks import Blocks
from runtime.cuda.decode.experts.ledger import DeviceLedger, Ledger
from runtime.cuda.decode.experts.ranges import most_used, ranges
from runtime.cuda.kernels import down as down_kernels
from runtime.cuda.kernels import gate_up as gate_up_kernels
from runtime.cuda.kernels import plan as plan_kernel
from runtime.cuda.kernels import prefetch as prefetch_kernels
from runtime.cuda.kernels import transfer as transfer_kernels
from runtime.cuda.memory.expert_block import CHUNK, ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, down_constants, gate_up_constants
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.share.order_to_cpu import NO_ORDER, OrderToCpu

FETCHERS = 64
"""Programs that fetch a layer's missing experts: enough to fill the link."""
PREFETCHERS = 32
"""Programs of a prefetch."""
THRESHOLD = 0.2
"""Least probability of use for a prefetch. The link would be idle, and the victim is the expert of
lowest value, so that a guess that is right once in five still pays."""


class ExpertsCall:
    """Kernels, buffers and the ledger for batches of exactly `batch` tokens.

    routers: for each layer, the weight [E, H] (and bias) of its router, to look one layer ahead;
    None where none was found. forecast: float32 [L * E], the predictor's probabilities
    for the running step, or None. resident: every expert of the model is in a slot, and stays.
    num_ranges: of a call; more than one need several tokens. order: how a single token's missed
    experts are left to the CPU; None: they never are.
    """

    def __init__(
        self,
        batch: int,
        top_k: int,
        layout: KernelLayout,
        block: ExpertBlock,
        slots_SN: Tensor,
        host: PinnedExperts,
        cache: DeviceCache,
        *,
        prefetch: bool = False,
        resident: bool = False,
        num_ranges: int = 1,
        routers: list[nn.Module | None] | None = None,
        forecast: Tensor | None = None,
        order: OrderToCpu | None = None,
    ) -> None:
        device = cache.clock.device
        self._layout, self._block, self._host, self._cache = layout, block, host, cache
        self._stored = {"STORED": block.stored_units, "CHUNK": CHUNK}
        self._units_SN, self._slots_SN = slots_SN, slots_SN.view(layout.dtype)
        self._batch, self._top_k = batch, top_k
        self._routers, self._forecast = routers or [None] * cache.num_layers, forecast
        self._order = order if batch == 1 and not resident else None
        self.compiled: dict[str, Any] = {}
        """What Triton made of the kernels that compute, by name, after the first call."""
        self._blocks = Blocks.of(batch, layout, block)
        self._ranges = ranges(cache.num_experts, self._blocks.parts, num_ranges)
        self.max_used = most_used(self._ranges, batch * top_k)
        """Most experts of one range."""
        is_safe = min(cache.num_experts, batch * top_k) <= len(cache.key_of_slot)
        self.prefetches, self._resident = prefetch and is_safe and not resident, resident
        self._plan = torch.zeros(3, self.max_used, dtype=torch.int32, device=device)
        self._h = torch.zeros(self.max_used, batch, layout.width, dtype=layout.dtype, device=device)
        self._written = DeviceLedger(
            cache.num_layers, batch, top_k, len(self._ranges), PREFETCHERS, device
        )
        self.ledger = self._written.whole
        self._routes, self._counts = self._written.routes, self._written.counts
        self._prefetched, self._used = self._written.prefetched, self._written.used
        self._progress = self._written.progress
        self._trust = torch.full((2,), 0.9, device=device)
        self._choices = torch.full((2,), -1, dtype=torch.int32, device=device)
        self._slot = torch.full((cache.num_layers,), -1, dtype=torch.int32, device=device)
        self._stop = torch.zeros(cache.num_layers, dtype=torch.int32, device=device)
        self._step = torch.zeros(1, dtype=torch.int32, device=device)
        self._side = torch.cuda.Stream(device) if self.prefetches else None
        self._pending: tuple[torch.cuda.Event | None, torch.cuda.Event | None] = None, None

    def read(self, ledger: np.ndarray) -> Ledger:
        """The parts of a ledger that was copied to the host, int32."""
        return self._written.read(ledger)

    def begin_step(self) -> None:
        """Once a step, before its first layer."""
        self._pending = None, None
        self._cache.begin_step()
        if self.prefetches:
            self._step.add_(1)
            self._progress.zero_()

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Experts `ids` (int64 [B, K], others are no expert) of x [B, H]: [B, H]."""
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        if self._resident:
            return self._run_residents(layer, x, ids, weights)
        (picked, fetched), self._pending = self._pending, (None, None)
        if picked is not None:
            torch.cuda.current_stream().wait_event(picked)
        sums = self._new_sums(x)
        for index in range(len(self._ranges)):
            self._run_plan(layer, ids, index, x)
            if fetched is not None and index == 0:
                torch.cuda.current_stream().wait_event(fetched)
            is_last = index == len(self._ranges) - 1
            has_next = self.prefetches and is_last and layer + 1 < self._cache.num_layers
            if has_next:
                picked = self._run_pick(layer + 1, x)
            self._run_gate_up(layer, x, FETCHERS, index)
            if has_next:
                self._pending = picked, self._run_fetch(layer + 1)
            self._run_gate_up(layer, x, 0, index)
            if self._order is not None:
                self._order.collect(self._counts[layer, index])
            self._sum_range(layer, x, ids, weights, sums, index)
        return self._joined(sums, x)

    def one_expert(self, stored_N: Tensor, x: Tensor) -> Tensor:
        """What the kernels of a single token's step make of one stored block and x [1, H]: float32
        [H], without a weight.
        """
        alone = copy.copy(self)
        device, size = x.device, self.max_used
        alone._units_SN, alone.compiled = stored_N[None], {}
        alone._slots_SN = alone._units_SN.view(self._layout.dtype)
        alone._plan = torch.zeros(3, size, dtype=torch.int32, device=device)
        alone._counts = torch.tensor([[[1, 0, 0]]], dtype=torch.int32, device=device)
        ids = torch.full((1, self._top_k), -1, device=device)
        ids[0, 0] = 0
        alone._run_gate_up(0, x, FETCHERS)
        y = torch.empty(x.shape, dtype=torch.float32, device=device)
        alone._sum_range(0, x, ids, (ids == 0).to(x.dtype), y, 0)
        return y[0]

    def _run_residents(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self._batch == 1:
            self._run_gate_up_of_one(layer, x, ids)
        else:
            self._run_plan(layer, ids)
            self._run_gate_up(layer, x, 0)
        return self._run_down(layer, x, ids, weights)

    def _run_plan(self, layer: int, ids: Tensor, index: int = 0, x: Tensor | None = None) -> None:
        """Plan a range, given by its index, as below."""
        cache, planned, order = self._cache, self._ranges[index], self._order
        plan_kernel.plan[(1,)](
            ids, *self._plan, self._counts[layer, index],
            cache.slot_of_key, cache.key_of_slot, cache.values, cache.before, cache.after,
            cache.clock, self._routes[layer],
            self._prefetched[layer:], self._slot[layer:], self._used[layer:],
            self._choices, self._trust, self._stop[layer:], self._step,
            *((ids, *(self._step,) * 4) if order is None or x is None else order.plan_inputs(x)),
            layer, planned.first, planned.end, ids.numel(), len(cache.key_of_slot),
            E=cache.num_experts, RULE=cache.rule, PREFETCH=self.prefetches,
            **(NO_ORDER if order is None else order.plan_constants),
            BLOCK_E=triton.next_power_of_2(cache.num_experts),
            BLOCK_S=triton.next_power_of_2(len(cache.key_of_slot)),
            BLOCK_P=triton.next_power_of_2(ids.numel()),
            num_warps=4 if len(cache.key_of_slot) <= 1024 else 16,
        )  # fmt: skip

    @property
    def _gate_up(self) -> dict[str, Any]:
        """Constants of the gate and up kernels."""
        layout, block, blocks = self._layout, self._block, self._blocks
        return gate_up_constants(block, layout) | {
            "BLOCK_I": blocks.rows, "BLOCK_H": blocks.columns, "num_warps": blocks.warps,
        }  # fmt: skip

    def _run_gate_up(self, layer: int, x: Tensor, fetchers: int, index: int = 0) -> None:
        blocks, num_blocks = self._blocks, triton.cdiv(self._layout.width, self._blocks.rows)
        experts, slots, order = self._plan
        grid = (fetchers + num_blocks * self.max_used,)
        self.compiled["gate_up"] = gate_up_kernels.gate_up[grid](
            x, self._h, self._slots_SN, self._units_SN, self._host.layers[layer],
            experts, slots, order, self._counts[layer, index],
            self._prefetched[layer:], self._progress[layer], len(x),
            FETCHERS=fetchers, PREFETCHERS=PREFETCHERS if self.prefetches else 0,
            RESIDENT=self._resident, SHARE=self._order is not None, M=blocks.padded,
            **self._gate_up,
        )  # fmt: skip

    def _run_gate_up_of_one(self, layer: int, x: Tensor, ids: Tensor) -> None:
        cache, num_blocks = self._cache, triton.cdiv(self._layout.width, self._blocks.rows)
        experts, slots, _ = self._plan
        gate_up_kernels.gate_up_of_one[(num_blocks * self.max_used,)](
            x, self._h, self._slots_SN, self._units_SN, ids, experts, slots, self._counts[layer, 0],
            cache.slot_of_key, cache.values, cache.before, cache.after, cache.clock,
            self._routes[layer], layer,
            E=cache.num_experts, K=self._top_k, RULE=cache.rule,
            BLOCK_K=triton.next_power_of_2(self._top_k), **self._gate_up,
        )  # fmt: skip

    def _new_sums(self, x: Tensor) -> Tensor:
        """Room for what `down` sums up: the result or, where it is in parts, those."""
        if self._blocks.parts == 1:
            return torch.empty_like(x)
        return x.new_empty(self._blocks.parts, *x.shape, dtype=torch.float32)

    def _run_down(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The sums of a call that is one range."""
        sums = self._new_sums(x)
        self._sum_range(layer, x, ids, weights, sums, 0)
        return self._joined(sums, x)

    def _sum_range(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, sums: Tensor, index: int
    ) -> None:
        shape, blocks, num_tokens = self._layout, self._blocks, len(x)
        (experts, slots, _), summed, order = self._plan, self._ranges[index], self._order
        grid = triton.cdiv(shape.hidden, blocks.down_rows), summed.num_parts
        self.compiled["down"] = down_kernels.down[grid](
            self._h, sums, ids, weights, self._slots_SN, self._units_SN, experts, slots,
            sums if order is None else order.answers, self._counts[layer, index], num_tokens,
            summed.first_part,
            **down_constants(self._block, shape), E=self._cache.num_experts, K=self._top_k,
            SHARE=order is not None,
            M=blocks.padded, PARTS=blocks.parts, BLOCK_U=triton.next_power_of_2(self.max_used),
            BLOCK_K=triton.next_power_of_2(self._top_k),
            BLOCK_N=blocks.down_rows, BLOCK_I=blocks.down_columns, num_warps=blocks.down_warps,
        )  # fmt: skip

    def _joined(self, sums: Tensor, x: Tensor) -> Tensor:
        """The sum of the parts, [B, H]."""
        if self._blocks.parts == 1:
            return sums
        y, num_tokens, hidden = torch.empty_like(x), len(x), self._layout.hidden
        block = min(1024, triton.next_power_of_2(hidden))
        down_kernels.join[(num_tokens, triton.cdiv(hidden, block))](
            sums, y, num_tokens, H=hidden, PARTS=self._blocks.parts, BLOCK=block
        )
        return y

    def _run_pick(self, layer: int, x: Tensor) -> torch.cuda.Event:
        assert self._side is not None
        cache, router = self._cache, self._routers[layer]
        bias = None if router is None else router._parameters.get("bias")
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            prefetch_kernels.pick[(1,)](
                x, x if router is None else router.weight, x if bias is None else bias,
                x if self._forecast is None else self._forecast,
                self._trust, self._choices, self._prefetched[layer:], self._slot[layer:],
                self._plan[1],
                self._counts[layer - 1, -1],
                cache.slot_of_key, cache.key_of_slot, cache.values, cache.before, cache.after,
                THRESHOLD, layer, len(x), len(cache.key_of_slot),
                H=self._layout.hidden, E=cache.num_experts, K=self._top_k, RULE=cache.rule,
                HAS_ROUTER=router is not None, HAS_BIAS=bias is not None,
                HAS_FORECAST=self._forecast is not None,
                BLOCK_E=triton.next_power_of_2(cache.num_experts),
                BLOCK_S=triton.next_power_of_2(len(cache.key_of_slot)),
                BLOCK_H=min(128, triton.next_power_of_2(self._layout.hidden)),
                num_warps=8,
            )  # fmt: skip
        return self._side.record_event()

    def _run_fetch(self, layer: int) -> torch.cuda.Event:
        assert self._side is not None
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            transfer_kernels.fetch[(PREFETCHERS,)](
                self._units_SN, self._host.layers[layer],
                self._prefetched[layer:], self._slot[layer:], self._stop[layer:], self._step,
                self._progress[layer], **self._stored, PROGRAMS=PREFETCHERS, num_warps=4,
            )  # fmt: skip
        return self._side.record_event()
