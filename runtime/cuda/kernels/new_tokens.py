"""The new keys and values of single tokens, written to their rows of the cache; and its pages.

Whatever is written lies on the device: pages in host memory are full.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from runtime.kv.pages.places import Paged


@triton.jit
def piece_of(table, row, table_R, first, PAGE: tl.constexpr):
    """Where position `first` of a row is: the row or, of PAGE positions each, the page; and where
    in it.
    """
    if PAGE:
        row = tl.load(table + row * table_R + first // PAGE).to(tl.int64)
        first = first % PAGE
    return row, first


@triton.jit(
    do_not_specialize=["table_R"], do_not_specialize_on_alignment=["rows", "positions", "table"]
)
def write_tokens(
    new_keys, new_values, keys, values, rows, positions, table,
    new_keys_T, new_keys_G, new_values_T, new_values_G,
    keys_R, keys_G, keys_C, values_R, values_G, values_C, table_R, PAGE: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One key head of one token a program."""
    token, group = tl.program_id(0), tl.program_id(1)
    row, position = tl.load(rows + token), tl.load(positions + token)
    at_D, at_V = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    key_D = tl.load(new_keys + token * new_keys_T + group * new_keys_G + at_D, mask=at_D < D)
    value_V = tl.load(
        new_values + token * new_values_T + group * new_values_G + at_V, mask=at_V < V
    )
    piece, place = piece_of(table, row, table_R, position, PAGE)
    to_D = keys + piece * keys_R + group * keys_G + place * keys_C + at_D
    tl.store(to_D, key_D, mask=at_D < D)
    to_V = values + piece * values_R + group * values_G + place * values_C + at_V
    tl.store(to_V, value_V, mask=at_V < V)


def write(
    new_keys_BGD: Tensor,
    new_values_BGV: Tensor,
    keys_RGCD: Tensor,
    values_RGCV: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    paged: Paged | None = None,
) -> None:
    """Write the keys and values of B tokens to their rows and positions. paged: where R counts
    pages.
    """
    new_keys_BGD, new_values_BGV = in_lines(new_keys_BGD), in_lines(new_values_BGV)
    (num_tokens, groups, width), value_width = new_keys_BGD.shape, new_values_BGV.shape[-1]
    assert keys_RGCD.stride(-1) == values_RGCV.stride(-1) == 1
    table, page = (rows_B, 0) if paged is None else (paged.table_RN, paged.page)
    write_tokens[(num_tokens, groups)](
        new_keys_BGD, new_values_BGV, keys_RGCD, values_RGCV, rows_B, positions_B, table,
        *new_keys_BGD.stride()[:2], *new_values_BGV.stride()[:2], *keys_RGCD.stride()[:3],
        *values_RGCV.stride()[:3], table.stride(0), PAGE=page, D=width, V=value_width,
        BLOCK_D=triton.next_power_of_2(width), BLOCK_V=triton.next_power_of_2(max(1, value_width)),
        num_warps=1,
    )  # fmt: skip


def in_lines(tensor: Tensor) -> Tensor:
    """The tensor, each line of its last axis in one piece."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
