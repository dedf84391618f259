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
from runtime.cuda.decode.experts.mover import NO_MOVES, Mover
from runtime.cuda.decode.experts.ranges import most_used, ranges
from runtime.cuda.kernels import down as down_kernels
from runtime.cuda.kernels import gate_up as gate_up_kernels
from runtime.cuda.kernels import plan as plan_kernel
from runtime.cuda.memory.expert_block import CHUNK, ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, down_constants, gate_up_constants
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.share.order_to_cpu import NO_ORDER, OrderToCpu

FETCHERS = 64
"""Programs that fetch a layer's missing experts: enough to fill the link."""


class ExpertsCall:
    """Kernels, buffers and the ledger for batches of exactly `batch` tokens.

    prefetch, routers, chances: whether experts are sent ahead, and by what (`Mover`). resident:
    every expert of the model is in a slot, and stays. num_ranges: of a call; more than one need
    several tokens. order: how a single token's missed experts are left to the CPU; None: they never
    are.
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
        chances: Tensor | None = None,
        order: OrderToCpu | None = None,
    ) -> None:
        device = cache.clock.device
        self._layout, self._block, self._host, self._cache = layout, block, host, cache
        self._stored = {"STORED": block.stored_units, "CHUNK": CHUNK}
        self._units_SN, self._slots_SN = slots_SN, slots_SN.view(layout.dtype)
        self._batch, self._top_k = batch, top_k
        self._order = order if batch == 1 and not resident else None
        self.compiled: dict[str, Any] = {}
        """What Triton made of the kernels that compute, by name, after the first call."""
        self._blocks = Blocks.of(batch, layout, block)
        self._ranges = ranges(cache.num_experts, self._blocks.parts, num_ranges)
        self.max_used = most_used(self._ranges, batch * top_k)
        """Most experts of one range."""
        is_safe = min(cache.num_experts, batch * top_k) <= len(cache.key_of_slot)
        is_even = all(len(blocks_EN) == cache.num_experts for blocks_EN in host.layers)
        self._mover: Mover | None = None
        if prefetch and is_safe and is_even and not resident:
            self._mover = Mover(
                layout.hidden, top_k, block, slots_SN, host, cache, routers, chances
            )
        self._resident = resident
        self._plan = torch.zeros(4, self.max_used, dtype=torch.int32, device=device)
        self._h = torch.zeros(self.max_used, batch, layout.width, dtype=layout.dtype, device=device)
        self._written = DeviceLedger(cache.num_layers, batch, top_k, len(self._ranges), device)
        self.ledger = self._written.whole
        self._routes, self._counts = self._written.routes, self._written.counts
        self._moved = self._written.moved

    @property
    def prefetches(self) -> bool:
        """Whether experts are sent ahead."""
        return self._mover is not None

    def read(self, ledger: np.ndarray) -> Ledger:
        """The parts of a ledger that was copied to the host, int32."""
        return self._written.read(ledger)

    def begin_step(self) -> None:
        """Once a step, before its first layer."""
        self.end_step()  # of a step that was broken off
        self._cache.begin_step()
        if self._mover is not None:
            self._moved.zero_()
            self._mover.begin_step()

    def end_step(self) -> None:
        """Once a step, after all else."""
        if self._mover is not None:
            self._mover.end_step(self._moved[-1, 0])

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Experts `ids` (int64 [B, K], others are no expert) of x [B, H]: [B, H]."""
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        if self._resident:
            return self._run_residents(layer, x, ids, weights)
        mover, sums = self._mover, self._new_sums(x)
        for index in range(len(self._ranges)):
            if mover is not None and index == 0:
                mover.before_plan()
            self._run_plan(layer, ids, index, x)
            if mover is not None and index == 0:
                mover.after_plan()
            is_last = index == len(self._ranges) - 1
            moves = mover is not None and is_last and mover.wants(layer + 1)
            if mover is not None and moves:
                mover.choose(layer + 1, x, self._plan[1], self._counts[layer, -1])
            self._run_gate_up(layer, x, FETCHERS, index)
            if mover is not None and moves:
                mover.bring()
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
        alone._plan = torch.zeros(4, size, dtype=torch.int32, device=device)
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
        cache, planned, order, mover = self._cache, self._ranges[index], self._order, self._mover
        plan_kernel.plan[(1,)](
            ids, *self._plan, self._counts[layer, index],
            cache.slot_of_key, cache.key_of_slot, cache.values, cache.before, cache.after,
            cache.clock, cache.rest, cache.sent, self._routes[layer], self._moved[layer, index],
            *((ids,) * 4 if mover is None else mover.plan_inputs),
            *((ids,) * 5 if order is None or x is None else order.plan_inputs(x)),
            layer, planned.first, planned.end, ids.numel(), len(cache.key_of_slot),
            E=cache.num_experts, RULE=cache.rule, PREFETCH=mover is not None,
            **(NO_MOVES if mover is None else mover.constants),
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
        grid = (fetchers + num_blocks * self.max_used,)
        self.compiled["gate_up"] = gate_up_kernels.gate_up[grid](
            x, self._h, self._slots_SN, self._units_SN, self._host.layers[layer],
            *self._plan, self._counts[layer, index], len(x),
            FETCHERS=fetchers, PREFETCH=self.prefetches, RESIDENT=self._resident,
            SHARE=self._order is not None, M=blocks.padded, **self._gate_up,
        )  # fmt: skip

    def _run_gate_up_of_one(self, layer: int, x: Tensor, ids: Tensor) -> None:
        cache, num_blocks = self._cache, triton.cdiv(self._layout.width, self._blocks.rows)
        experts, slots = self._plan[:2]
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
        (experts, slots), summed, order = self._plan[:2], self._ranges[index], self._order
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
