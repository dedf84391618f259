"""The two products of a layer's experts over the rows of tiles, and the sum over each token's."""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.gate_up import RELU2, activate
from runtime.cuda.kernels.grouped.weights import weights_of_rows
from runtime.cuda.kernels.packed import add_patches, base_at
from runtime.cuda.kernels.unpacked import record_elements, tile_of


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
def upright(sums, TURNED: tl.constexpr):
    """The sums as [M, N]."""
    if TURNED:
        sums = tl.trans(sums)
    return sums


@triton.jit(do_not_specialize=["group"], do_not_specialize_on_alignment=["tiles", "starts"])
def grouped_gate_up(
    x, order, h, slots, units, tiles, starts, group,
    STORED: tl.constexpr, UP: tl.constexpr, UP_BIAS: tl.constexpr, MATRICES: tl.constexpr,
    PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, ALTERNATING: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """H [P, W] = act(x W_gate^T) * (x W_up^T). order: int32 [P], token * K + k of each row.

    slots, units: the same memory, in the weights' type and as int16. Grid (tiles, blocks of W);
    more tiles than the group has do nothing.
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
    base = base_at(stored, UP, MATRICES, CHUNK, PATCHES) if PATCHES > 0 else 0
    gate, up = zeros_of(BLOCK_M, BLOCK_N, TURNED), zeros_of(BLOCK_M, BLOCK_N, TURNED)
    for start in range(0, H, BLOCK_K):
        x_MK = tile_of(x, token_M, mask_M, start + tl.arange(0, BLOCK_K), H)
        gate_NK = weights_of_rows(
            block, stored, gate_row_N, mask_N, start, base, UP, H, MATRICES, PATCHES, CODE,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        gate = add_product(gate, x_MK, gate_NK, TURNED)
        if ACT.kind != RELU2:  # which has no gate: the first product is the only one
            up_NK = weights_of_rows(
                block, stored, up_row_N, mask_N, start, base, UP, H, MATRICES, PATCHES, CODE,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            up = add_product(up, x_MK, up_NK, TURNED)
    gate_MN, up_MN = upright(gate, TURNED), upright(up, TURNED)
    if PATCHES > 0:
        SPAN: tl.constexpr = 2 * BLOCK_N if ALTERNATING else BLOCK_N
        UP_SPAN: tl.constexpr = SPAN if ALTERNATING or W % BLOCK_N == 0 else SPAN + 1
        gate_MN = add_patches(
            gate_MN, x, token_M, mask_M, stored, 2 * column if ALTERNATING else column,
            gate_row_N, UP, H, MATRICES, CHUNK, PATCHES, SPAN,
        )  # fmt: skip
        if ACT.kind != RELU2:
            up_MN = add_patches(
                up_MN, x, token_M, mask_M, stored, 2 * column if ALTERNATING else W + column,
                up_row_N, UP, H, MATRICES, CHUNK, PATCHES, UP_SPAN,
            )  # fmt: skip
    if HAS_BIAS:
        gate_MN += bias_of(block + UP_BIAS, gate_row_N, mask_N)
        up_MN += bias_of(block + UP_BIAS, up_row_N, mask_N)
    h_MN = activate(gate_MN, up_MN, ACT).to(h.dtype.element_ty)
    to_MN = row_M.to(tl.int64)[:, None] * W + column_N[None, :]
    tl.store(h + to_MN, h_MN, mask=mask_M[:, None] & mask_N[None, :])


@triton.jit(do_not_specialize=["group"], do_not_specialize_on_alignment=["tiles", "starts"])
def grouped_down(
    h, order, y, slots, units, tiles, starts, group,
    STORED: tl.constexpr, DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, MATRICES: tl.constexpr,
    PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Y [T * K, H], the unweighted result of each pair. Grid (tiles, blocks of H)."""
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
    base = base_at(stored, DOWN, MATRICES, CHUNK, PATCHES) if PATCHES > 0 else 0
    sums = zeros_of(BLOCK_M, BLOCK_N, TURNED)
    for start in range(0, W, BLOCK_K):
        h_MK = tile_of(h, row_M, mask_M, start + tl.arange(0, BLOCK_K), W)
        down_NK = weights_of_rows(
            block, stored, column_N, mask_N, start, base, DOWN, W, MATRICES, PATCHES, CODE,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sums = add_product(sums, h_MK, down_NK, TURNED)
    y_MN = upright(sums, TURNED)
    if PATCHES > 0:
        y_MN = add_patches(
            y_MN, h, row_M, mask_M, stored, column, column_N, DOWN, W, MATRICES, CHUNK, PATCHES,
            BLOCK_N,
        )  # fmt: skip
    if HAS_BIAS:
        y_MN += bias_of(block + DOWN_BIAS, column_N, mask_N)
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
