"""Matrix products of many tokens with many experts, out of slots: one launch a group of experts.

Rows are (token, expert) pairs sorted by expert. A tile is a stretch of one expert's rows:

    tiles [*, 3] int32    first row, number of rows, slot

So a group can be whatever has arrived, in any slots, and a row's result depends on neither.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.gate_up import activate
from runtime.cuda.kernels.unpacked import record_elements, tile_of


@triton.jit
def grouped_gate_up(
    x, pairs, h, slots, tiles,
    UNITS: tl.constexpr, UP: tl.constexpr, UP_BIAS: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, ALTERNATING: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """H [P, W] = act(x W_gate^T) * (x W_up^T). pairs: int64 [P], token * K + k of each row.

    Grid (tiles, blocks of W).
    """
    tile = tiles + tl.program_id(0) * 3
    first, count = tl.load(tile), tl.load(tile + 1)
    block = slots + tl.load(tile + 2).to(tl.int64) * record_elements(slots, UNITS)
    row_M = first + tl.arange(0, BLOCK_M)
    mask_M = tl.arange(0, BLOCK_M) < count
    token_M = tl.load(pairs + row_M, mask=mask_M, other=0) // K
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_N = column_N < W
    gate_row_N = 2 * column_N if ALTERNATING else column_N
    up_row_N = 2 * column_N + 1 if ALTERNATING else W + column_N
    gate_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, H, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        x_MH = tile_of(x, token_M, mask_M, inner, H)
        gate_NH = tile_of(block + UP, gate_row_N, mask_N, inner, H)
        up_NH = tile_of(block + UP, up_row_N, mask_N, inner, H)
        gate_MN = tl.dot(x_MH, tl.trans(gate_NH), gate_MN, input_precision="ieee")
        up_MN = tl.dot(x_MH, tl.trans(up_NH), up_MN, input_precision="ieee")
    if HAS_BIAS:
        gate_bias = tl.load(block + UP_BIAS + gate_row_N, mask=mask_N, other=0.0)
        up_bias = tl.load(block + UP_BIAS + up_row_N, mask=mask_N, other=0.0)
        gate_MN += gate_bias.to(tl.float32)[None, :]
        up_MN += up_bias.to(tl.float32)[None, :]
    h_MN = activate(gate_MN, up_MN, ACT).to(h.dtype.element_ty)
    to_MN = row_M.to(tl.int64)[:, None] * W + column_N[None, :]
    tl.store(h + to_MN, h_MN, mask=mask_M[:, None] & mask_N[None, :])


@triton.jit
def grouped_down(
    h, pairs, y, slots, tiles,
    UNITS: tl.constexpr, DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Y [T * K, H], the unweighted result of each pair. Grid (tiles, blocks of H)."""
    tile = tiles + tl.program_id(0) * 3
    first, count = tl.load(tile), tl.load(tile + 1)
    block = slots + tl.load(tile + 2).to(tl.int64) * record_elements(slots, UNITS)
    row_M = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_M = tl.arange(0, BLOCK_M) < count
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_N = column_N < H
    y_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, W, BLOCK_W):
        inner = start + tl.arange(0, BLOCK_W)
        h_MW = tile_of(h, row_M, mask_M, inner, W)
        down_NW = tile_of(block + DOWN, column_N, mask_N, inner, W)
        y_MN = tl.dot(h_MW, tl.trans(down_NW), y_MN, input_precision="ieee")
    if HAS_BIAS:
        bias_N = tl.load(block + DOWN_BIAS + column_N, mask=mask_N, other=0.0)
        y_MN += bias_N.to(tl.float32)[None, :]
    pair_M = tl.load(pairs + row_M, mask=mask_M, other=0)
    to_MN = pair_M[:, None] * H + column_N[None, :]
    tl.store(y + to_MN, y_MN.to(y.dtype.element_ty), mask=mask_M[:, None] & mask_N[None, :])


@triton.jit
def combine(y, weights, out, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """The weighted sum of each token's K results y [T * K, H]: out [T, H]. Grid (T, blocks)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        row = tl.load(y + pair * H + column, mask=column < H, other=0.0).to(tl.float32)
        sums += row * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * H + column, sums.to(out.dtype.element_ty), mask=column < H)
