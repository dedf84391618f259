"""Test bench of the experts' kernels: one layer of experts in slots, and its timings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common.shapes import empty_model, shape_named
from benchmarks.kernels.candidates import blocks as block_candidates
from benchmarks.kernels.candidates import blocks_text, tiles
from benchmarks.kernels.clock import Clock, in_turn
from benchmarks.kernels.report import TimedKernel
from routing.layers import Routes, find_moe_layers
from runtime.cache.expert_cache import ExpertCache
from runtime.cache.policies import LRU
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.experts.blocks import Blocks
from runtime.cuda.decode.experts.experts_call import FETCHERS, ExpertsCall
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, layout_of, stored_specs
from runtime.cuda.memory.unpacking import unpack_blocks
from runtime.cuda.prefill.products import Products, Work, sort
from runtime.cuda.prefill.tiling import Tile, Tiles, Tiling, most_tiles
from runtime.weights.arena import Spec, Specs
from runtime.weights.packed.packing import PATCHES

TURNS = 8
"""Sets of experts used in turn."""


class Bench(Clock):
    """One layer's experts at a model's size, all resident. repeats: launches timed together."""

    def __init__(self, shape: str, device: torch.device, repeats: int) -> None:
        layer = find_moe_layers(empty_model(shape_named(shape)))[0]
        parameters = dict(layer.module.named_parameters())
        specs = {name: Spec(p.shape[1:], p.dtype) for name, p in parameters.items()}
        layout = layout_of(layer, specs)
        assert isinstance(layout, KernelLayout)
        super().__init__(device, repeats)
        self._layout = layout
        self._num_experts, self._top_k = layer.num_experts, layer.top_k
        self._fill(stored_specs(specs, layout))

    def _fill(self, specs: Specs) -> None:
        """Draw the experts: as they are, and as slots hold them."""
        block = ExpertBlock(specs)
        shape_EN = self._num_experts, block.units
        self._weights_EN = torch.empty(shape_EN, dtype=torch.int16, device=self._device)
        for block_N in self._weights_EN:
            block_N.view(self._layout.dtype).normal_(0, 0.02)
        self._block = block.packed(PATCHES[0] if block.can_pack else 0)
        stored = [self._block.store(block_N) for block_N in self._weights_EN]
        self._slots_SN = torch.stack([stored_N for stored_N in stored if stored_N is not None])

    def _routes(self, num_tokens: int) -> Routes:
        chances = torch.rand(num_tokens, self._num_experts, device=self._device)
        experts_TK = chances.topk(self._top_k, -1).indices
        return Routes(experts_TK, torch.rand(experts_TK.shape, device=self._device))

    def _x(self, num_tokens: int) -> torch.Tensor:
        shape = num_tokens, self._layout.hidden
        return torch.randn(shape, device=self._device).to(self._layout.dtype)

    # ------------------------------------------------------------------ prefill

    def prefill(self, num_tokens: int) -> Iterator[TimedKernel]:
        """The grouped products of a prompt: out of slots, and out of unpacked blocks."""
        routes, x_TH = self._routes(num_tokens), self._x(num_tokens)
        counts = torch.bincount(routes.experts_TK.flatten(), minlength=self._num_experts)
        ends, num_used = counts.cumsum(0)[counts > 0].tolist(), int((counts > 0).sum())
        yield from self._torch_grouped(num_tokens, ends)
        yield from self._unpacking(num_tokens, num_used)
        block = self._block
        forms = {"": (Products(block, self._slots_SN, self._layout), block)}
        if not block.is_plain:
            forms["plain "] = Products(block.plain, self._weights_EN, self._layout), block.plain
        for form, (products, stored) in forms.items():
            used = Tiling.of(num_tokens * self._top_k, self._num_experts, stored).tiles
            is_plain = stored.is_plain
            launches = self._launches(products, x_TH, routes, used, is_plain=is_plain)
            for name, tile, launch, matrices in launches:
                in_use = tile == (used.gate_up if matrices == 2 else used.down)
                yield self._timed(
                    form + name, num_tokens, str(tuple(tile)), in_use, self._seconds(launch),
                    matrices, num_used,
                )  # fmt: skip

    def _launches(
        self,
        products: Products,
        x_TH: torch.Tensor,
        routes: Routes,
        used: Tiles,
        *,
        is_plain: bool,
    ) -> Iterator[tuple[str, Tile, Callable[[], None], int]]:
        """Both products in every candidate's tiles, with the matrices that they read."""
        num_pairs = routes.experts_TK.numel()
        work = Work.of(num_pairs, self._num_experts, self._layout, self._device)
        counts_E = torch.zeros(self._num_experts, dtype=torch.int32, device=self._device)
        slots_E = torch.arange(self._num_experts, dtype=torch.int32, device=self._device)
        x_TH = products.arranged(x_TH)
        for tile in tiles(used.rows, used.gate_up, is_plain=is_plain):
            sort(routes.experts_TK, work, counts_E, slots_E, self._num_experts, tile.rows)
            most = most_tiles(num_pairs, self._num_experts, tile.rows)
            args = x_TH, self._top_k, work, tile, 0, most
            yield "grouped_gate_up", tile, partial(products.run_gate_up, *args), 2
        for tile in tiles(used.rows, used.down, is_plain=is_plain):
            sort(routes.experts_TK, work, counts_E, slots_E, self._num_experts, tile.rows)
            most = most_tiles(num_pairs, self._num_experts, tile.rows)
            yield "grouped_down", tile, partial(products.run_down, work, tile, 0, most), 1

    def _unpacking(self, num_tokens: int, num_used: int) -> Iterator[TimedKernel]:
        """Unpacking, which comes before the products of prompts that are long."""
        if self._block.patches:
            picked = torch.arange(num_used, dtype=torch.int32, device=self._device)
            to_EN = torch.empty_like(self._weights_EN)
            launch = partial(unpack_blocks, self._block, self._slots_SN, picked, to_EN)
            seconds = self._seconds(launch)
            yield self._timed("unpack", num_tokens, "-", True, seconds, 3, num_used)

    def _torch_grouped(self, num_tokens: int, ends: list[int]) -> Iterator[TimedKernel]:
        """The same products by torch, without activation: a bound for comparison."""
        layout = self._layout
        views = self._block.views(self._weights_EN)
        ends_E = torch.tensor(ends, dtype=torch.int32, device=self._device)
        for name, matrices in (("gate_up_proj", 2), ("down_proj", 1)):
            weights_ENK = views[name][: len(ends)]
            x_PK = torch.randn(ends[-1], weights_ENK.shape[-1], device=self._device)
            launch = partial(torch._grouped_mm, x_PK.to(layout.dtype), weights_ENK.mT, offs=ends_E)
            yield self._timed(f"torch {name}", num_tokens, "torch._grouped_mm", True,
                              self._seconds(launch), matrices, len(ends))  # fmt: skip

    # ------------------------------------------------------------------ decode

    def decode(self, batch: int) -> Iterator[TimedKernel]:
        """The kernels of one expert call in a captured step.

        Calls with different experts take turns, as layers do: one call's weights would stay in the
        GPU's cache.
        """
        calls = [self._planned(batch, turn) for turn in range(TURNS)]
        num_used = sum(len(ids.unique()) for _, _, ids, _ in calls) / TURNS
        in_use = calls[0][0]._blocks
        kernels: dict[str, tuple[Callable[[Any], Any], int]] = {
            "gate_up": (lambda one: one[0]._run_gate_up(0, one[1], FETCHERS), 2),
            "down": (lambda one: one[0]._run_down(0, *one[1:]), 1),
            "plan": (lambda one: one[0]._run_plan(0, one[2]), 0),
        }
        for name, (launch, matrices) in kernels.items():
            for blocks in self._candidates(name, in_use) if matrices else [in_use]:
                for call, *_ in calls:
                    call._blocks = blocks
                seconds = self._seconds(in_turn(launch, calls))
                candidate = blocks_text(name, blocks) if matrices else "-"
                yield self._timed(
                    name, batch, candidate, blocks == in_use, seconds, matrices, num_used
                )

    def _candidates(self, kernel: str, in_use: Blocks) -> list[Blocks]:
        return block_candidates(kernel, in_use, self._layout)

    def _planned(
        self, batch: int, turn: int
    ) -> tuple[ExpertsCall, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A call whose experts are planned, and its arguments. At batch 1 no two turns share an
        expert.
        """
        call, (ids, weights) = self._call(batch), self._routes(batch)
        if batch == 1:
            first = turn * self._top_k
            ids = torch.arange(first, first + self._top_k, device=self._device)[None]
            ids %= self._num_experts
        call._run_plan(0, ids)
        return call, self._x(batch), ids, weights

    def _call(self, batch: int) -> ExpertsCall:
        experts = self._num_experts
        device_cache = DeviceCache(
            ExpertCache(1, experts, experts, LRU(1, experts)), 1, self._device
        )
        device_cache.upload()
        device_cache.slot_of_key.copy_(torch.arange(experts))
        device_cache.key_of_slot.copy_(torch.arange(experts))
        host: Any = SimpleNamespace(layers=[self._slots_SN])
        return ExpertsCall(
            batch, self._top_k, self._layout, self._block, self._slots_SN, host, device_cache
        )

    def _timed(
        self, kernel: str, tokens: int, candidate: str, in_use: bool, seconds: float,
        matrices: int, num_used: float,
    ) -> TimedKernel:  # fmt: skip
        weights = matrices * self._layout.hidden * self._layout.width
        is_stored = not kernel.startswith(("plain", "torch"))  # which read unpacked weights
        ratio = self._block.stored_units / self._block.units if is_stored else 1.0
        return TimedKernel(
            kernel, tokens, candidate, in_use, seconds,
            num_used * weights * self._layout.dtype.itemsize * ratio,
            2.0 * tokens * self._top_k * weights,
        )  # fmt: skip
