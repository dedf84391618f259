"""What `benchmarks.tiles` times: a layer of experts in slots, and the candidates of its kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from types import SimpleNamespace
from typing import Any

import torch
import triton

from benchmarks.shapes import empty_model, shape_named
from benchmarks.tiles import Timed
from routing.layers import Routes, find_moe_layers
from runtime.cache.expert_cache import ExpertCache
from runtime.cache.policies import LRU
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.experts_call import FETCHERS, LEAST_COLUMNS, Blocks, ExpertsCall
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, layout_of, stored_specs
from runtime.cuda.memory.packing import PATCHES
from runtime.cuda.memory.pinned_experts import unpack_blocks
from runtime.cuda.prefill.grouped_experts import Products, Tile, Tiles, table_of
from runtime.engine.experts import sort_pairs, spans_of
from runtime.weights.arena import Spec

LOW = [Tile(16, 32), Tile(16, 64), Tile(16, 64, 128), Tile(16, 128), Tile(16, 64, stages=4)]
MIDDLE = [
    Tile(64, 64), Tile(64, 64, stages=4), Tile(64, 128), Tile(64, 128, warps=8),
    Tile(64, 64, 128), Tile(32, 64), Tile(32, 128),
]  # fmt: skip
HIGH = [
    Tile(128, 64), Tile(128, 64, warps=8), Tile(128, 128, warps=8), Tile(128, 64, stages=4),
    Tile(128, 128, 32, warps=8, stages=4), Tile(128, 32), Tile(64, 128, warps=4),
]  # fmt: skip
TURNS = 8
"""Sets of experts that take turns."""


class Bench:
    """One layer's experts at a model's size, all resident. repeats: launches timed together."""

    def __init__(self, shape: str, device: torch.device, repeats: int) -> None:
        layer = find_moe_layers(empty_model(shape_named(shape)))[0]
        parameters = dict(layer.module.named_parameters())
        specs = {name: Spec(p.shape[1:], p.dtype) for name, p in parameters.items()}
        layout = layout_of(layer, specs)
        assert isinstance(layout, KernelLayout)
        self._layout, self._device, self._repeats = layout, device, repeats
        self._num_experts, self._top_k = layer.num_experts, layer.top_k
        record = ExpertBlock(stored_specs(specs, layout))
        shape_EN = self._num_experts, record.units
        self._weights_EN = torch.empty(shape_EN, dtype=torch.int16, device=device)
        for record_N in self._weights_EN:
            record_N.view(layout.dtype).normal_(0, 0.02)
        self._record = record.packed(PATCHES[0] if record.can_pack else 0)
        stored = [self._record.store(record_N) for record_N in self._weights_EN]
        self._slots_SN = torch.stack([stored_N for stored_N in stored if stored_N is not None])

    def _routes(self, num_tokens: int) -> Routes:
        chances = torch.rand(num_tokens, self._num_experts, device=self._device)
        experts_TK = chances.topk(self._top_k, -1).indices
        return Routes(experts_TK, torch.rand(experts_TK.shape, device=self._device))

    def _x(self, num_tokens: int) -> torch.Tensor:
        shape = num_tokens, self._layout.hidden
        return torch.randn(shape, device=self._device).to(self._layout.dtype)

    # ------------------------------------------------------------------ prefill

    def prefill(self, num_tokens: int) -> Iterator[Timed]:
        """The grouped products of a prompt."""
        routes = self._routes(num_tokens)
        order_P, counts = sort_pairs(routes.experts_TK, self._num_experts)
        spans = spans_of(counts.tolist())
        x_TH = self._x(num_tokens)
        workspace_RN = self._weights_EN if self._record.patches else None
        products = Products(
            self._record, self._slots_SN, self._layout, x_TH, order_P, self._top_k, workspace_RN
        )
        used = Tiles.of(len(order_P) / len(spans))
        group = [(span, expert) for expert, span in spans.items()]
        kernels = {
            "grouped_gate_up": (products.run_gate_up, used.gate_up, 2),
            "grouped_down": (products.run_down, used.down, 1),
        }
        yield from self._torch_grouped(num_tokens, spans)
        yield from self._unpacking(num_tokens, len(spans))
        for name, (launch, in_use, matrices) in kernels.items():
            for tile in self._tiles(used.rows, in_use):
                table = torch.tensor(table_of(group, tile.rows), dtype=torch.int32)
                seconds = self._seconds(partial(launch, table.to(self._device), tile))
                yield self._timed(
                    name,
                    num_tokens,
                    str(tuple(tile)),
                    tile == in_use,
                    seconds,
                    matrices,
                    len(spans),
                )

    def _unpacking(self, num_tokens: int, num_used: int) -> Iterator[Timed]:
        """What comes before the products of packed experts."""
        if self._record.patches:
            picked = torch.arange(num_used, dtype=torch.int32, device=self._device)
            to_EN = torch.empty_like(self._weights_EN)
            launch = partial(unpack_blocks, self._record, self._slots_SN, picked, to_EN)
            seconds = self._seconds(launch)
            yield self._timed("unpack", num_tokens, "-", True, seconds, 3, num_used)

    def _torch_grouped(self, num_tokens: int, spans: dict[int, slice]) -> Iterator[Timed]:
        """The same products by torch, without activation: what is to be had."""
        layout, ends = self._layout, [span.stop for span in spans.values()]
        views = self._record.views(self._weights_EN)
        ends_E = torch.tensor(ends, dtype=torch.int32, device=self._device)
        for name, matrices in (("gate_up_proj", 2), ("down_proj", 1)):
            weights_ENK = views[name][list(spans)] if len(spans) < len(views[name]) else views[name]
            x_PK = torch.randn(ends[-1], weights_ENK.shape[-1], device=self._device)
            launch = partial(torch._grouped_mm, x_PK.to(layout.dtype), weights_ENK.mT, offs=ends_E)
            yield self._timed(f"torch {name}", num_tokens, "torch._grouped_mm", True,
                              self._seconds(launch), matrices, len(spans))  # fmt: skip

    def _tiles(self, rows: int, in_use: Tile) -> list[Tile]:
        near = LOW if rows <= 16 else MIDDLE if rows <= 64 else HIGH
        return list(dict.fromkeys([in_use, *near]))

    # ------------------------------------------------------------------ decode

    def decode(self, batch: int) -> Iterator[Timed]:
        """The kernels of one expert call in a captured step.

        Calls with other experts take turns, as layers do: the weights of one would stay in the
        GPU's own cache.
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
            for blocks in self._blocks(name, in_use) if matrices else [in_use]:
                for call, *_ in calls:
                    call._blocks = blocks
                seconds = self._seconds(_in_turn(launch, calls))
                candidate = _told(name, blocks) if matrices else "-"
                yield self._timed(
                    name, batch, candidate, blocks == in_use, seconds, matrices, num_used
                )

    def _planned(
        self, batch: int, turn: int
    ) -> tuple[ExpertsCall, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A call whose experts have their slots, and its arguments; one token's experts are those
        of no other turn.
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
            batch, self._top_k, self._layout, self._record, self._slots_SN, host, device_cache
        )

    def _blocks(self, kernel: str, in_use: Blocks) -> list[Blocks]:
        """Candidates for one kernel, the present one first."""
        heights = (4, 8) if in_use.padded == 1 else (16, 32, 64)
        widths = (512, 1024, 2048) if in_use.padded == 1 else (LEAST_COLUMNS, 256)
        limit = self._layout.hidden if kernel == "gate_up" else self._layout.width
        if in_use.padded == 1:
            widths = tuple({min(width, triton.next_power_of_2(limit)) for width in widths})
        names = ["rows", "columns", "warps"]
        if kernel == "down":
            names = [f"down_{name}" for name in names]
        found = [in_use]
        for height, width in product(heights, sorted(widths)):
            for warps in (4, 8) if in_use.padded == 1 or width == max(widths) else (4,):
                sizes = height, width, warps
                found.append(in_use._replace(**dict(zip(names, sizes, strict=True))))
        if kernel == "down" and in_use.padded > 1:
            found += [in_use._replace(parts=parts) for parts in (1, 2, 4, 8)]
        return list(dict.fromkeys(found))

    # ------------------------------------------------------------------ timing

    def _seconds(self, launch: Callable[[], Any]) -> float:
        """Of one launch; infinite where a program takes more than the GPU has."""
        try:
            launch()
        except triton.runtime.errors.OutOfResources:
            return float("inf")
        if self._device.type != "cuda":
            start = time.perf_counter()
            launch()
            return time.perf_counter() - start
        return self._graphed(launch)

    def _graphed(self, launch: Callable[[], Any]) -> float:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(self._repeats):
                launch()
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._repeats

    def _timed(
        self, kernel: str, tokens: int, candidate: str, in_use: bool, seconds: float,
        matrices: int, num_used: float,
    ) -> Timed:  # fmt: skip
        weights = matrices * self._layout.hidden * self._layout.width
        is_stored = kernel in ("gate_up", "down", "unpack")  # others read unpacked weights
        ratio = self._record.stored_units / self._record.units if is_stored else 1.0
        return Timed(
            kernel, tokens, candidate, in_use, seconds,
            num_used * weights * self._layout.dtype.itemsize * ratio,
            2.0 * tokens * self._top_k * weights,
        )  # fmt: skip


def _in_turn(launch: Callable[[Any], Any], arguments: Sequence[Any]) -> Callable[[], Any]:
    """Each call launches with the next of the arguments, in a circle."""
    turns = cycle(arguments)
    return lambda: launch(next(turns))


def _told(kernel: str, blocks: Blocks) -> str:
    if kernel == "gate_up":
        return str((blocks.rows, blocks.columns, blocks.warps))
    return str((blocks.down_rows, blocks.down_columns, blocks.down_warps, blocks.parts))
