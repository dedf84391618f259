"""A layer's experts for many tokens: groups of experts run as they arrive in their slots."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from routing.layers import Routes
from runtime.cuda.grouped_kernels import combine, grouped_down, grouped_gate_up
from runtime.cuda.layout import ACTIVATIONS, Layout
from runtime.cuda.record import Record
from runtime.cuda.streamed import StreamedPool
from runtime.experts import sort_rows

TILE_ROWS = (16, 64, 128)
"""Rows of a tile: the least that most experts' rows fill."""


def run_grouped(
    pool: StreamedPool, layout: Layout, layer: int, hidden_TH: Tensor, routes: Routes
) -> Tensor:
    """The experts call of `layer`: [T, H]. A token's results are summed in top-k order."""
    top_k = routes.experts_TK.shape[1]
    order_P, spans = sort_rows(routes.experts_TK)
    products = Products(pool.record, pool.slots_SN, layout, hidden_TH, order_P, top_k)
    if sum(span.stop - span.start for span in spans.values()) < len(order_P):
        products.y_PH.zero_()  # some pairs are of no expert
    mean = len(order_P) / max(len(spans), 1)
    block = next((rows for rows in TILE_ROWS if mean <= rows), TILE_ROWS[-1])
    for group in pool.serve_groups(layer, list(spans)):
        products.run(list(tiles_of([(spans[e], slot) for e, slot in group], block)), block)
    return products.combined(routes.weights_TK)


def tiles_of(group: list[tuple[slice, int]], block: int) -> Iterator[tuple[int, int, int]]:
    """The tile table of some experts' (rows, slot)."""
    for span, slot in group:
        for first in range(span.start, span.stop, block):
            yield first, min(block, span.stop - first), slot


class Products:
    """The two matrix products of one layer call, for one group of experts after the other.

    order_P: int64, the pairs token * K + k, sorted by expert.
    """

    def __init__(
        self,
        record: Record,
        slots_SN: Tensor,
        layout: Layout,
        x_TH: Tensor,
        order_P: Tensor,
        top_k: int,
    ) -> None:
        self._record, self._layout, self._top_k = record, layout, top_k
        self._x_TH, self._order_P = x_TH.contiguous(), order_P
        self._slots_SN = slots_SN.view(layout.dtype)
        self._h_PW = x_TH.new_empty(len(order_P), layout.width)
        self.y_PH = x_TH.new_empty(len(order_P), layout.hidden)

    def run(self, tiles: list[tuple[int, int, int]], block: int) -> None:
        """Run the tiles of one group, of up to `block` rows each."""
        shape, record = self._layout, self._record
        table_N3 = torch.tensor(tiles, dtype=torch.int32).to(self._x_TH.device, non_blocking=True)
        columns = 64 if block > 16 else 32
        grouped_gate_up[(len(tiles), triton.cdiv(shape.width, columns))](
            self._x_TH, self._order_P, self._h_PW, self._slots_SN, table_N3,
            UNITS=record.units, UP=record.start("gate_up_proj"),
            UP_BIAS=record.start("gate_up_proj_bias"), H=shape.hidden, W=shape.width, K=self._top_k,
            ACT=ACTIVATIONS.index(shape.activation), ALTERNATING=shape.alternating,
            HAS_BIAS=shape.has_bias, BLOCK_M=block, BLOCK_N=columns, BLOCK_H=64,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        grouped_down[(len(tiles), triton.cdiv(shape.hidden, columns))](
            self._h_PW, self._order_P, self.y_PH, self._slots_SN, table_N3,
            UNITS=record.units, DOWN=record.start("down_proj"),
            DOWN_BIAS=record.start("down_proj_bias"), H=shape.hidden, W=shape.width,
            HAS_BIAS=shape.has_bias, BLOCK_M=block, BLOCK_N=columns, BLOCK_W=64,
            num_warps=4, num_stages=3,
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
