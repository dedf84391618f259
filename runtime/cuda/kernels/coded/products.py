"""Products with matrices in codes, which are decoded in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.coded.decoding import (
    MXFP4,
    behind,
    codes_of,
    first_code,
    for_products,
    weights_of,
)
from runtime.cuda.kernels.coded.tiles import group_of, scales_of, words_of
from runtime.cuda.kernels.packed import eighths, first_of, second_of
from runtime.cuda.kernels.unpacked import record_elements

AHEAD, HALF_AHEAD = tl.constexpr(8), tl.constexpr(4)
"""Tiles of one token's sum that are loaded together."""


@triton.constexpr_function
def hoists(kind: int, dtype: tl.dtype) -> bool:
    """Whether scales may be left to sums of products: powers of two, by which nothing rounds."""
    return kind == MXFP4.value and dtype != tl.float16


@triton.jit
def load_vector(x, start, mask, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K entries of a vector from `start` on, or BLOCK_K / 2 pairs of bfloat16 in int32."""
    if x.dtype.element_ty == tl.bfloat16:
        at_K = start // 2 + tl.arange(0, BLOCK_K // 2)
        pairs = x.to(tl.pointer_type(tl.int32), bitcast=True)
        entries_K = tl.load(pairs + at_K, mask=(at_K < WIDTH // 2) & mask, other=0)
    else:
        at_K = start + tl.arange(0, BLOCK_K)
        entries_K = tl.load(x + at_K, mask=(at_K < WIDTH) & mask, other=0.0)
    return entries_K


@triton.jit
def both_of(pair, factor):
    """Two bfloat16 in an int32, times factor, in float32."""
    return first_of(pair) * factor, second_of(pair) * factor


@triton.jit
def eighths_of(entries_K, factor, G: tl.constexpr, J: tl.constexpr):
    """Every eighth entry of factor * x from 0, 1, ... on: [G, J] each, float32."""
    if entries_K.dtype == tl.int32:
        even, odd = tl.split(tl.reshape(entries_K, (G, J, 2, 2)))
        x_01, x_45 = tl.split(even)
        x_23, x_67 = tl.split(odd)
        x_0, x_1 = both_of(x_01, factor)
        x_2, x_3 = both_of(x_23, factor)
        x_4, x_5 = both_of(x_45, factor)
        x_6, x_7 = both_of(x_67, factor)
    else:
        x_K = entries_K.to(tl.float32) * factor
        x_0, x_2, x_1, x_3, x_4, x_6, x_5, x_7 = eighths(tl.reshape(x_K, (G, J, 2, 2, 2)))
    return x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7


@triton.jit
def add_tile(
    sums_NGJ, words, scale, zero, entries_K, CODE: tl.constexpr, DTYPE: tl.constexpr,
    G: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Add the products of a tile with x. Exact for activations up to 2^62."""
    BEHIND: tl.constexpr = behind(CODE.kind)
    if hoists(CODE.kind, DTYPE):
        x_GJ = eighths_of(entries_K, 2.0**64, G, J)
        products = tl.zeros(words.shape, tl.float32)
        for pair in tl.static_range(4):
            first, second = codes_of(words, pair, zero, CODE.kind)
            products += first * x_GJ[first_code(pair, CODE.kind)][None, :, :]
            products += second * x_GJ[first_code(pair, CODE.kind) + BEHIND][None, :, :]
        sums_NGJ += products * 2.0**63 * scale
    else:
        x_GJ = eighths_of(entries_K, 1.0, G, J)
        scale = for_products(scale, words, CODE.kind)
        for pair in tl.static_range(4):
            first, second = weights_of(
                words, pair, scale, zero, CODE.kind, CODE.product, DTYPE, False
            )
            sums_NGJ += first * x_GJ[first_code(pair, CODE.kind)][None, :, :]
            sums_NGJ += second * x_GJ[first_code(pair, CODE.kind) + BEHIND][None, :, :]
    return sums_NGJ


@triton.constexpr_function
def reads_ahead(num_experts: int, width: int, block: int) -> bool:
    """Whether one token's sum is written out tile by tile: of wide experts, ptxas would take hours
    over it.
    """
    return num_experts * -(-width // block) <= 4 * AHEAD.value


@triton.jit
def add_tiles(
    sums_NGJ, x, block, rows_N, mask_N, first, WIDTH: tl.constexpr, CODE: tl.constexpr,
    BLOCK_K: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Add the products of COUNT tiles of some rows, from tile `first` on, with one vector."""
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, WIDTH)
    G: tl.constexpr = BLOCK_K // (8 * J)
    DTYPE: tl.constexpr = x.dtype.element_ty
    for step in tl.static_range(COUNT):
        group_G = (first + step) * G + tl.arange(0, G)
        words = words_of(block, rows_N, mask_N, group_G, WIDTH, CODE, J)
        scale, zero = scales_of(block, rows_N, mask_N, group_G, WIDTH, CODE, J)
        entries_K = load_vector(x, (first + step) * BLOCK_K, True, WIDTH, BLOCK_K)
        sums_NGJ = add_tile(sums_NGJ, words, scale, zero, entries_K, CODE, DTYPE, G, J)
    return sums_NGJ


@triton.jit
def product_of_one(
    x, block, rows_N, mask_N, WIDTH: tl.constexpr, CODE: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some rows of a matrix [*, WIDTH] in a stored block times one vector: [N] in float32."""
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, WIDTH)
    TILES: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    sums_NGJ = tl.zeros([N, BLOCK_K // (8 * J), J], tl.float32)
    if TILES <= AHEAD:
        sums_NGJ = add_tiles(sums_NGJ, x, block, rows_N, mask_N, 0, WIDTH, CODE, BLOCK_K, TILES)
    else:
        for first in range(0, TILES, HALF_AHEAD):
            sums_NGJ = add_tiles(
                sums_NGJ, x, block, rows_N, mask_N, first, WIDTH, CODE, BLOCK_K, HALF_AHEAD
            )
    return sum_over(sums_NGJ)


@triton.jit
def weighted_sum_of_one(
    h, ids_MK, weights_MK, slots, units, experts_U, slots_U, answers, num_used, rows_N, mask_N,
    STORED: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr,
    BIAS: tl.constexpr, K: tl.constexpr, SHARE: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some rows of a single token's weighted sum over its experts: [N], float32.

    Tiles are loaded AHEAD at a time, whosever they are: one after the other they would wait.
    BIAS: where biases are in a block, None for none. SHARE, answers: of `down.down`.
    """
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, WIDTH)
    G: tl.constexpr = BLOCK_K // (8 * J)
    DTYPE: tl.constexpr = h.dtype.element_ty
    TILES: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    y_N = tl.zeros([N], tl.float32)
    sums_NGJ = tl.zeros([N, G, J], tl.float32)
    for first in tl.static_range(0, K * TILES, AHEAD):
        loaded = ()
        for step in tl.static_range(first, first + AHEAD):
            if step < K * TILES:
                at = step // TILES
                slot = tl.load(slots_U + at, mask=at < num_used, other=-1).to(tl.int64)
                is_here = slot >= 0
                block, mask = units + slot * STORED, mask_N & is_here
                group_G = step % TILES * G + tl.arange(0, G)
                words = words_of(block, rows_N, mask, group_G, WIDTH, CODE, J)
                scale, zero = scales_of(block, rows_N, mask, group_G, WIDTH, CODE, J)
                start = step % TILES * BLOCK_K
                entries_K = load_vector(h + at * WIDTH, start, is_here, WIDTH, BLOCK_K)
                loaded += ((words, scale, zero, entries_K, slot),)  # type: ignore[assignment]
        for step in tl.static_range(first, first + AHEAD):
            if step < K * TILES:
                words, scale, zero, entries_K, slot = loaded[step - first]
                if step % TILES == 0:
                    sums_NGJ = tl.zeros([N, G, J], tl.float32)
                sums_NGJ = add_tile(sums_NGJ, words, scale, zero, entries_K, CODE, DTYPE, G, J)
                if (step + 1) % TILES == 0:
                    at = step // TILES
                    product_N = sum_over(sums_NGJ)
                    if BIAS is not None:
                        biases = slots + slot * record_elements(slots, STORED) + BIAS
                        bias_N = tl.load(biases + rows_N, mask=mask_N & (slot >= 0), other=0.0)
                        product_N += bias_N.to(tl.float32)
                    if SHARE:
                        is_away = (slot < 0) & (at < num_used)
                        answer_N = tl.load(
                            answers + at * H + rows_N, mask=mask_N & is_away, other=0.0
                        )
                        product_N = tl.where(is_away, answer_N, product_N)
                    expert = tl.load(experts_U + at, mask=at < num_used, other=0)
                    is_used = (ids_MK == expert) & (at < num_used)
                    y_N += tl.sum(tl.where(is_used, weights_MK, 0.0)) * product_N
    return y_N


@triton.jit
def sum_over(sums_NGJ):
    """The sums of each row: [N]."""
    return tl.sum(tl.sum(sums_NGJ, axis=2), axis=1)


@triton.jit
def coded_rows_of(
    x, block, rows_N, mask_N, num_tokens, WIDTH: tl.constexpr, CODE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X [*, WIDTH] times some rows of a coded matrix in a stored block: [M, N] in float32."""
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, WIDTH)
    G: tl.constexpr = BLOCK_K // (8 * J)
    if M == 1:
        product_MN = product_of_one(x, block, rows_N, mask_N, WIDTH, CODE, N, BLOCK_K)[None, :]
    else:
        token_M = tl.arange(0, M)
        product_MN = tl.zeros([M, N], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            column_K = start + tl.arange(0, BLOCK_K)
            mask_MK = (token_M < num_tokens)[:, None] & (column_K < WIDTH)[None, :]
            x_MK = tl.load(
                x + token_M[:, None] * WIDTH + column_K[None, :], mask=mask_MK, other=0.0
            )
            group_G = start // (8 * J) + tl.arange(0, G)
            product_MN = add_coded_dots(
                product_MN, x_MK, block, rows_N, mask_N, group_G, WIDTH, CODE, M, N, BLOCK_K
            )
    return product_MN


@triton.jit
def add_coded_dots(
    sums_MN, x_MK, block, rows_N, mask_N, group_G, WIDTH: tl.constexpr, CODE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the products of BLOCK_K columns of some rows with those of X."""
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, WIDTH)
    DTYPE: tl.constexpr = x_MK.dtype
    BEHIND: tl.constexpr = behind(CODE.kind)
    words = words_of(block, rows_N, mask_N, group_G, WIDTH, CODE, J)
    scale, zero = scales_of(block, rows_N, mask_N, group_G, WIDTH, CODE, J)
    scale = for_products(scale, words, CODE.kind)
    x_0, x_2, x_1, x_3, x_4, x_6, x_5, x_7 = eighths(tl.reshape(x_MK, (M, BLOCK_K // 8, 2, 2, 2)))
    x_ME = x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7
    for pair in tl.static_range(4):
        w = weights_of(words, pair, scale, zero, CODE.kind, CODE.product, DTYPE, False)
        for number in tl.static_range(2):
            w_NE = tl.reshape(w[number], (N, BLOCK_K // 8)).to(DTYPE)
            x = x_ME[first_code(pair, CODE.kind) + number * BEHIND]
            sums_MN = tl.dot(x, tl.trans(w_NE), sums_MN, input_precision="ieee")
    return sums_MN


@triton.jit
def coded_gate_and_up(
    x, block, first, num_tokens, H: tl.constexpr, W: tl.constexpr, CODE: tl.constexpr,
    ALTERNATING: tl.constexpr, M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """X times BLOCK_I rows each of the gate and the up projection, from `first` on: [M, I].

    The rows take turns in one tile, whichever way they are stored, so X is read once for both.
    """
    row_R = tl.arange(0, 2 * BLOCK_I)
    row_I, is_up_I = first + row_R // 2, row_R % 2
    rows_R = 2 * row_I + is_up_I if ALTERNATING else row_I + is_up_I * W
    product_MR = coded_rows_of(
        x, block, rows_R, row_I < W, num_tokens, H, CODE, M, 2 * BLOCK_I, BLOCK_H
    )
    return tl.split(tl.reshape(product_MR, (M, BLOCK_I, 2)))
