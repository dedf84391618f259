"""Launches of the grouped products, out of blocks as they are stored or out of plain ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from routing.layers import Routes
from runtime.cuda.kernels.grouped.columns import FAR, NATURAL, arrange, length_of, order_of
from runtime.cuda.kernels.grouped.products import combine, grouped_down, grouped_gate_up
from runtime.cuda.kernels.grouped.sorting import sort_pairs
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout, down_constants, gate_up_constants
from runtime.cuda.prefill.tiling import LEAST_ROWS, Tile, Tiles, most_tiles

FEW_PAIRS = 8192
"""Up to which more and smaller programs sort."""


class Sorting(NamedTuple):
    """How pairs are sorted by expert. By measurement on an H200."""

    sorted: int
    """Pairs that a program sorts."""
    counted: int
    """Pairs that it counts at a time: all of them, as every program does."""
    warps: int

    @staticmethod
    def of(num_pairs: int) -> Sorting:
        return Sorting(32, 2048, 8) if num_pairs <= FEW_PAIRS else Sorting(128, 1024, 4)


class Work(NamedTuple):
    """The memory of an experts call of P pairs; all layers of a forward pass share it."""

    order_P: Tensor
    """int32, the pairs token * K + k, sorted by expert."""
    tiles_N3: Tensor
    """int32"""
    starts_G: Tensor
    """int32"""
    h_PW: Tensor
    """As long as any order of columns takes."""
    y_PH: Tensor

    @staticmethod
    def of(num_pairs: int, num_experts: int, layout: KernelLayout, device: torch.device) -> Work:
        """For so many pairs over so many experts."""
        numbers: dict[str, Any] = {"dtype": torch.int32, "device": device}
        most = most_tiles(num_pairs, num_experts, LEAST_ROWS)
        longest = length_of(layout.width, FAR.value)
        return Work(
            torch.empty(num_pairs, **numbers),
            torch.empty(most, 3, **numbers),
            torch.empty(num_experts + 1, **numbers),
            torch.empty(num_pairs, longest, dtype=layout.dtype, device=device),
            torch.empty(num_pairs, layout.hidden, dtype=layout.dtype, device=device),
        )


class Products:
    """Products in memory, and the two products with them. slots_SN: int16 [S, stored units]."""

    def __init__(self, block: ExpertBlock, slots_SN: Tensor, layout: KernelLayout) -> None:
        self._units_SN, self._slots_SN = slots_SN, slots_SN.view(layout.dtype)
        self._hidden, self._width = layout.hidden, layout.width
        gate_up, down = gate_up_constants(block, layout), down_constants(block, layout)
        self._order = order_of(block.patches, gate_up["CODE"])
        self.h_order = order_of(block.patches, down["CODE"])
        """Of the columns between the products."""
        self._gate_up = gate_up | {"ORDER": self._order, "H_ORDER": self.h_order}
        self._down = down | {"ORDER": self.h_order}

    def arranged(self, x_TH: Tensor) -> Tensor:
        """Some rows, their columns in the order in which the first product decodes its weights."""
        return arranged(x_TH, self._order)

    def run(self, x_TH: Tensor, top_k: int, work: Work, tiles: Tiles, group: int, num: int) -> None:
        """Both products of one group of `work`, of `num` tiles at most. x: as `arranged`."""
        self.run_gate_up(x_TH, top_k, work, tiles.gate_up, group, num)
        self.run_down(work, tiles.down, group, num)

    def run_gate_up(
        self, x_TH: Tensor, top_k: int, work: Work, tile: Tile, group: int, num: int
    ) -> None:
        """The first product, of x as `arranged`."""
        grouped_gate_up[(num, triton.cdiv(self._width, tile.columns))](
            x_TH, work.order_P, work.h_PW, self._slots_SN, self._units_SN, work.tiles_N3,
            work.starts_G, group, K=top_k, **self._gate_up, **_sizes(tile),
        )  # fmt: skip

    def run_down(self, work: Work, tile: Tile, group: int, num: int) -> None:
        """The second product."""
        grouped_down[(num, triton.cdiv(self._hidden, tile.columns))](
            work.h_PW, work.order_P, work.y_PH, self._slots_SN, self._units_SN, work.tiles_N3,
            work.starts_G, group, **self._down, **_sizes(tile),
        )  # fmt: skip


def arranged(x_TH: Tensor, order: int) -> Tensor:
    """Rows with their columns in one of the orders of `grouped.columns`."""
    if order == NATURAL.value:
        return x_TH
    num_rows, columns = x_TH.shape
    length = length_of(columns, order)
    to_TH = torch.empty(num_rows, length, dtype=x_TH.dtype, device=x_TH.device)
    block = min(1024, triton.next_power_of_2(length))
    arrange[(num_rows, triton.cdiv(length, block))](
        x_TH, to_TH, H=columns, ORDER=order, BLOCK=block
    )
    return to_TH


def _sizes(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.inner,
        "num_warps": tile.warps, "num_stages": tile.stages, "TURNED": tile.turned,
    }  # fmt: skip


def sort(
    experts_TK: Tensor, work: Work, counts_E: Tensor, slots_E: Tensor, group: int, height: int
) -> None:
    """Sort the pairs of int64 `experts_TK` by expert: order, tiles and groups of `group` experts in
    `work`, counts in int32 `counts_E`.

    slots_E: int32, the slot of each expert, where tiles are to be used. Nothing waits.
    """
    num_pairs, num_experts = experts_TK.numel(), len(counts_E)
    num_tiles = most_tiles(num_pairs, num_experts, height)
    assert num_tiles <= len(work.tiles_N3), "tiles are lower than the least"
    most = max(num_pairs, num_tiles)
    how = Sorting.of(num_pairs)
    sort_pairs[(triton.cdiv(most, how.sorted),)](
        experts_TK, work.order_P, work.tiles_N3, work.starts_G, counts_E, slots_E, num_pairs,
        height, E=num_experts, GROUP=group, BLOCK_P=how.sorted,
        BLOCK_E=triton.next_power_of_2(num_experts), COUNTED=how.counted, num_warps=how.warps,
    )  # fmt: skip


def combined(x_TH: Tensor, routes: Routes, work: Work, num_experts: int) -> Tensor:
    """The weighted sums of each token's results, [T, H], in the order of its top-k."""
    out_TH = torch.empty_like(x_TH)
    num_tokens, hidden = x_TH.shape
    block = min(1024, triton.next_power_of_2(hidden))
    combine[(num_tokens, triton.cdiv(hidden, block))](
        work.y_PH, routes.experts_TK, routes.weights_TK, out_TH, H=hidden,
        K=routes.experts_TK.shape[1], E=num_experts, BLOCK=block,
    )  # fmt: skip
    return out_TH
