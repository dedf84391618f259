"""A layer's experts for many tokens: groups of experts run as they arrive in their slots."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from routing.layers import Routes
from runtime.cuda.kernels.grouped import combine, grouped_down, grouped_gate_up
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import ACTIVATIONS, KernelLayout
from runtime.cuda.memory.pinned_experts import unpack_blocks
from runtime.cuda.prefill.streaming_pool import Ahead, StreamingPool
from runtime.engine.experts import sort_pairs, spans_of


class Tile(NamedTuple):
    """A program's part of a matrix product, and how it is compiled."""

    rows: int
    columns: int
    inner: int = 64
    """Of the summed dimension, at a time."""
    warps: int = 4
    stages: int = 3
    """Loads under way."""


class Tiles(NamedTuple):
    """Of the two products; they share their rows."""

    gate_up: Tile
    down: Tile

    @property
    def rows(self) -> int:
        return self.gate_up.rows

    @staticmethod
    def of(num_rows: float) -> Tiles:
        """The least height that so many rows of an expert fill, else the greatest."""
        return next((tiles for tiles in TILES if num_rows <= tiles.rows), TILES[-1])


TILES = (
    Tiles(Tile(16, 64, 128), Tile(16, 64, 128)),
    Tiles(Tile(64, 64), Tile(64, 64, 128)),
    Tiles(Tile(128, 64, warps=8), Tile(128, 128, warps=8)),
)
"""Ascending. By `benchmarks.kernels` on an H100, within the memory of smaller GPUs."""


def run_grouped(
    pool: StreamingPool, layout: KernelLayout, layer: int, hidden_TH: Tensor, routes: Routes,
    ahead: Ahead | None = None,
) -> Tensor:  # fmt: skip
    """The experts call of `layer`: [T, H]. A token's results are summed in top-k order.

    The host waits once, for what the tokens want; what `ahead` wants comes with it.
    """
    top_k = routes.experts_TK.shape[1]
    order_P, counts = sort_pairs(routes.experts_TK, pool.num_experts)
    told = (counts if ahead is None else torch.cat([counts, ahead.wanted_E])).cpu()
    spans = spans_of(told[: len(counts)].tolist())
    if ahead is not None:
        ahead = ahead._replace(wanted_E=told[len(counts) :])
    products = Products(
        pool.expert_block, pool.slots_SN, layout, hidden_TH, order_P, top_k, pool.workspace_RN
    )
    if sum(span.stop - span.start for span in spans.values()) < len(order_P):
        products.y_PH.zero_()  # some pairs are of no expert
    tiles = Tiles.of(len(order_P) / max(len(spans), 1))
    for group in pool.serve_groups(layer, list(spans), ahead):
        products.run([(spans[expert], slot) for expert, slot in group], tiles)
    return products.combined(routes.weights_TK)


def table_of(group: list[tuple[slice, int]], height: int) -> list[tuple[int, int, int]]:
    """Of some experts' (rows, slot), each tile's (first row, number of rows, slot)."""
    return [
        (first, min(height, span.stop - first), slot)
        for span, slot in group
        for first in range(span.start, span.stop, height)
    ]


class Products:
    """The two matrix products of one layer call, for one group of experts after the other.

    order_P: int64, the pairs token * K + k, sorted by expert. workspace_RN: int16, where records
    that are packed or in codes become plain, R at a time.
    """

    def __init__(
        self,
        block: ExpertBlock,
        slots_SN: Tensor,
        layout: KernelLayout,
        x_TH: Tensor,
        order_P: Tensor,
        top_k: int,
        workspace_RN: Tensor | None = None,
    ) -> None:
        self._stored_SN, self._workspace_RN = slots_SN, workspace_RN
        self._expert_block, self._layout, self._top_k = block, layout, top_k
        self._x_TH, self._order_P = x_TH.contiguous(), order_P
        self._slots_SN = (slots_SN if workspace_RN is None else workspace_RN).view(layout.dtype)
        self._h_PW = x_TH.new_empty(len(order_P), layout.width)
        self.y_PH = x_TH.new_empty(len(order_P), layout.hidden)

    def run(self, group: list[tuple[slice, int]], tiles: Tiles) -> None:
        """Run some experts, given as (their rows, slot)."""
        if self._workspace_RN is None:
            self._run(group, tiles)
            return
        size = len(self._workspace_RN)
        for start in range(0, len(group), size):
            some = group[start : start + size]
            picked_R = self._on_device([slot for _, slot in some])
            unpack_blocks(self._expert_block, self._stored_SN, picked_R, self._workspace_RN)
            self._run([(span, row) for row, (span, _) in enumerate(some)], tiles)

    def _run(self, group: list[tuple[slice, int]], tiles: Tiles) -> None:
        table_N3 = self._on_device(table_of(group, tiles.rows))
        self.run_gate_up(table_N3, tiles.gate_up)
        self.run_down(table_N3, tiles.down)

    def _on_device(self, numbers: list[Any]) -> Tensor:
        table = torch.tensor(numbers, dtype=torch.int32)
        return table.to(self._x_TH.device, non_blocking=True)

    def run_gate_up(self, table_N3: Tensor, tile: Tile) -> None:
        """The first product, of the tiles in int32 `table_N3` on the device."""
        shape, block = self._layout, self._expert_block
        grouped_gate_up[(len(table_N3), triton.cdiv(shape.width, tile.columns))](
            self._x_TH, self._order_P, self._h_PW, self._slots_SN, table_N3,
            UNITS=block.units, UP=block.start("gate_up_proj"),
            UP_BIAS=block.start("gate_up_proj_bias"), H=shape.hidden, W=shape.width, K=self._top_k,
            ACT=ACTIVATIONS.index(shape.activation), ALTERNATING=shape.alternating,
            HAS_BIAS=shape.has_bias, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_H=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def run_down(self, table_N3: Tensor, tile: Tile) -> None:
        """The second product."""
        shape, block = self._layout, self._expert_block
        grouped_down[(len(table_N3), triton.cdiv(shape.hidden, tile.columns))](
            self._h_PW, self._order_P, self.y_PH, self._slots_SN, table_N3,
            UNITS=block.units, DOWN=block.start("down_proj"),
            DOWN_BIAS=block.start("down_proj_bias"), H=shape.hidden, W=shape.width,
            HAS_BIAS=shape.has_bias, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_W=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def combined(self, weights_TK: Tensor) -> Tensor:
        """[T, H], the weighted sums over each token's experts."""
        out_TH = torch.empty_like(self._x_TH)
        hidden = self._layout.hidden
        block = min(1024, triton.next_power_of_2(hidden))
        combine[(len(out_TH), triton.cdiv(hidden, block))](
            self.y_PH, weights_TK.contiguous(), out_TH, H=hidden, K=self._top_k, BLOCK=block
        )
        return out_TH
