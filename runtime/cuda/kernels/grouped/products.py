"""The two products of a layer's experts over the rows of tiles, and the sum over each token's."""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.gate_up import RELU2, activate
from runtime.cuda.kernels.grouped.columns import columns_of, length_of, parts_of, place_of
from runtime.cuda.kernels.grouped.patches import add_patches
from runtime.cuda.kernels.grouped.weights import base_of, part_of, stored_tile
from runtime.cuda.kernels.unpacked import record_elements


@triton.jit
def tile_at(tiles, number):
    """The first row of a tile, its number of rows, and its slot."""
    tile = tiles + number * 3
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2).to(tl.int64)


@triton.jit
def bias_of(bias, rows_N, mask_N):
    """The bias of some rows of a matrix, float32 [1, N]."""
    return tl.load(bias + rows_N, mask=mask_N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def zeros_of(M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr):
    """Sums of a tile [M, N], or [N, M] where it is turned."""
    return tl.zeros([N, M] if TURNED else [M, N], tl.float32)


@triton.jit
def add_product(sums, x_MK, weights_NK, TURNED: tl.constexpr):
    """Add x W^T, or W x^T: then weights that were decoded go from registers to the tensor cores."""
    if TURNED:
        sums = tl.dot(weights_NK, tl.trans(x_MK), sums, input_precision="ieee")
    else:
        sums = tl.dot(x_MK, tl.trans(weights_NK), sums, input_precision="ieee")
    return sums


@triton.jit
def finished(
    sums, x, row_M, mask_M, block, units, row, rows_N, mask_N, BIAS: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, MATRICES: tl.constexpr, PATCHES: tl.constexpr,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, HAS_BIAS: tl.constexpr, ORDER: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """The sums of a tile as [M, N], with patches and bias. SPAN: rows of the matrix, from `row` on,
    that those of the tile are among.
    """
    if TURNED:
        sums = tl.trans(sums)
    if PATCHES > 0:
        sums = add_patches(
            sums, x, row_M, mask_M, units, row, rows_N, FIRST, WIDTH, MATRICES, CHUNK, PATCHES,
            SPAN, ORDER,
        )  # fmt: skip
    if HAS_BIAS:
        sums += bias_of(block + BIAS, rows_N, mask_N)
    return sums


@triton.jit(do_not_specialize=["group"], do_not_specialize_on_alignment=["tiles", "starts"])
def grouped_gate_up(
    x, order, h, slots, units, tiles, starts, group,
    STORED: tl.constexpr, UP: tl.constexpr, UP_BIAS: tl.constexpr, MATRICES: tl.constexpr,
    PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, ALTERNATING: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr, ORDER: tl.constexpr, H_ORDER: tl.constexpr,
):  # fmt: skip
    """H [P, W] = act(x W_gate^T) * (x W_up^T). order: int32 [P], token * K + k of each row.

    slots, units: the same memory, in the weights' type and as int16. ORDER: of the columns of x,
    H_ORDER: of h. Grid (tiles, blocks of W); more tiles than the group has do nothing.
    """
    number = tl.load(starts + group) + tl.program_id(0)
    if number >= tl.load(starts + group + 1):
        return
    first, count, slot = tile_at(tiles, number)
    block, stored = slots + slot * record_elements(slots, STORED), units + slot * STORED
    row_M = first + tl.arange(0, BLOCK_M)
    mask_M = tl.arange(0, BLOCK_M) < count
    token_M = (tl.load(order + row_M, mask=mask_M, other=0) // K).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N
    column_N = column + tl.arange(0, BLOCK_N)
    mask_N = column_N < W
    gate_row_N = 2 * column_N if ALTERNATING else column_N
    up_row_N = 2 * column_N + 1 if ALTERNATING else W + column_N
    base = base_of(stored, column_N, UP, MATRICES, CHUNK, PATCHES) if PATCHES > 0 else 0
    DTYPE: tl.constexpr = slots.dtype.element_ty
    gate, up = zeros_of(BLOCK_M, BLOCK_N, TURNED), zeros_of(BLOCK_M, BLOCK_N, TURNED)
    for start in range(0, H, BLOCK_K):
        gate_1, gate_2, gate_3 = stored_tile(
            block, stored, gate_row_N, mask_N, start, base, UP, H, MATRICES, PATCHES, CODE,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if ACT.kind != RELU2:  # which has no gate: the first product is the only one
            up_1, up_2, up_3 = stored_tile(
                block, stored, up_row_N, mask_N, start, base, UP, H, MATRICES, PATCHES, CODE,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
        for part in tl.static_range(parts_of(ORDER)):
            x_MK = columns_of(x, token_M, mask_M, start, part, H, ORDER, BLOCK_K)
            w_NK = part_of(gate_1, gate_2, gate_3, part, PATCHES, CODE, DTYPE, BLOCK_N, BLOCK_K)
            gate = add_product(gate, x_MK, w_NK, TURNED)
            if ACT.kind != RELU2:
                w_NK = part_of(up_1, up_2, up_3, part, PATCHES, CODE, DTYPE, BLOCK_N, BLOCK_K)
                up = add_product(up, x_MK, w_NK, TURNED)
    SPAN: tl.constexpr = 2 * BLOCK_N if ALTERNATING else BLOCK_N
    UP_SPAN: tl.constexpr = SPAN if ALTERNATING or W % BLOCK_N == 0 else SPAN + 1
    gate_MN = finished(
        gate, x, token_M, mask_M, block, stored, 2 * column if ALTERNATING else column, gate_row_N,
        mask_N, UP_BIAS, UP, H, MATRICES, PATCHES, CHUNK, SPAN, HAS_BIAS, ORDER, TURNED,
    )  # fmt: skip
    up_MN = finished(
        up, x, token_M, mask_M, block, stored, 2 * column if ALTERNATING else W + column, up_row_N,
        mask_N, UP_BIAS, UP, H, MATRICES, PATCHES if ACT.kind != RELU2 else 0, CHUNK, UP_SPAN,
        HAS_BIAS, ORDER, TURNED,
    )  # fmt: skip
    h_MN = activate(gate_MN, up_MN, ACT).to(h.dtype.element_ty)
    to_MN = row_M.to(tl.int64)[:, None] * length_of(W, H_ORDER) + place_of(column_N, H_ORDER)
    tl.store(h + to_MN, h_MN, mask=mask_M[:, None] & (column_N < length_of(W, H_ORDER))[None, :])


@triton.jit(do_not_specialize=["group"], do_not_specialize_on_alignment=["tiles", "starts"])
def grouped_down(
    h, order, y, slots, units, tiles, starts, group,
    STORED: tl.constexpr, DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, MATRICES: tl.constexpr,
    PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, TURNED: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Y [T * K, H], the unweighted result of each pair. ORDER: of the columns of h.

    Grid (tiles, blocks of H).
    """
    number = tl.load(starts + group) + tl.program_id(0)
    if number >= tl.load(starts + group + 1):
        return
    first, count, slot = tile_at(tiles, number)
    block, stored = slots + slot * record_elements(slots, STORED), units + slot * STORED
    row_M = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_M = tl.arange(0, BLOCK_M) < count
    column = tl.program_id(1) * BLOCK_N
    column_N = column + tl.arange(0, BLOCK_N)
    mask_N = column_N < H
    base = base_of(stored, column_N, DOWN, MATRICES, CHUNK, PATCHES) if PATCHES > 0 else 0
    DTYPE: tl.constexpr = slots.dtype.element_ty
    sums = zeros_of(BLOCK_M, BLOCK_N, TURNED)
    for start in range(0, W, BLOCK_K):
        down_1, down_2, down_3 = stored_tile(
            block, stored, column_N, mask_N, start, base, DOWN, W, MATRICES, PATCHES, CODE,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        for part in tl.static_range(parts_of(ORDER)):
            h_MK = columns_of(h, row_M, mask_M, start, part, W, ORDER, BLOCK_K)
            w_NK = part_of(down_1, down_2, down_3, part, PATCHES, CODE, DTYPE, BLOCK_N, BLOCK_K)
            sums = add_product(sums, h_MK, w_NK, TURNED)
    y_MN = finished(
        sums, h, row_M, mask_M, block, stored, column, column_N, mask_N, DOWN_BIAS, DOWN, W,
        MATRICES, PATCHES, CHUNK, BLOCK_N, HAS_BIAS, ORDER, TURNED,
    )  # fmt: skip
    pair_M = tl.load(order + row_M, mask=mask_M, other=0).to(tl.int64)
    to_MN = pair_M[:, None] * H + column_N[None, :]
    tl.store(y + to_MN, y_MN.to(y.dtype.element_ty), mask=mask_M[:, None] & mask_N[None, :])


@triton.jit
def combine(
    y, ids, weights, out, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weighted sum of each token's results y [T * K, H], in top-k order: out [T, H].

    Pairs whose id is of no expert have no result. Grid (T, blocks of H).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        expert = tl.load(ids + pair)
        is_there = (column < H) & (expert >= 0) & (expert < E)
        row = tl.load(y + pair * H + column, mask=is_there, other=0.0).to(tl.float32)
        sums += row * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * H + column, sums.to(out.dtype.element_ty), mask=column < H)
