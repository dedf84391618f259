"""The down projection of a layer's experts, run out of slots, and the sum over each token's.

Shapes: h [U, B, W] as `gate_up` leaves it, down [H, W], y [B, H].
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.coded.products import coded_rows_of, reads_ahead, weighted_sum_of_one
from runtime.cuda.kernels.packed import packed_rows_of
from runtime.cuda.kernels.unpacked import record_elements, rows_of


@triton.jit
def product_of(
    h_of_expert, slots, units, slot, num_tokens, first_row, row_N, mask_N,
    STORED: tl.constexpr, DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, MATRICES: tl.constexpr,
    PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Some rows of what the expert in `slot` adds for each token, unweighted: [M, N] in float32."""
    block = slots + slot * record_elements(slots, STORED)
    if PATCHES > 0:
        product_MN = packed_rows_of(
            h_of_expert, units + slot * STORED, first_row, row_N, mask_N, num_tokens, DOWN, W,
            MATRICES, CHUNK, PATCHES, BLOCK_N, M, BLOCK_N, BLOCK_I,
        )  # fmt: skip
    elif CODE is not None:
        product_MN = coded_rows_of(
            h_of_expert, units + slot * STORED, row_N, mask_N, num_tokens, W, CODE, M, BLOCK_N,
            BLOCK_I,
        )  # fmt: skip
    else:
        product_MN = rows_of(
            h_of_expert, block + DOWN, row_N, mask_N, num_tokens, W, M, BLOCK_N, BLOCK_I
        )
    if HAS_BIAS:
        bias_N = tl.load(block + DOWN_BIAS + row_N, mask=mask_N, other=0.0)
        product_MN += bias_N.to(tl.float32)[None, :]
    return product_MN


@triton.jit
def weight_of(experts_U, at, ids_MK, weights_MK):
    """The weight of a single token's expert number `at`."""
    return tl.sum(tl.where(ids_MK == tl.load(experts_U + at), weights_MK, 0.0))


@triton.jit
def row_of_one(
    h, slots, units, slots_U, answers, at, first_row, row_N, mask_N, STORED: tl.constexpr,
    DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, MATRICES: tl.constexpr, PATCHES: tl.constexpr,
    CODE: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    HAS_BIAS: tl.constexpr, SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Some rows of what a single token's expert number `at` adds, unweighted: [1, N]."""
    slot = tl.load(slots_U + at).to(tl.int64)
    if SHARE and slot < 0:
        product_MN = tl.load(answers + at * H + row_N, mask=mask_N, other=0.0)[None, :]
    else:
        product_MN = product_of(
            h + at * W, slots, units, slot, 1, first_row, row_N, mask_N, STORED, DOWN, DOWN_BIAS,
            MATRICES, PATCHES, CODE, CHUNK, W, HAS_BIAS, 1, BLOCK_N, BLOCK_I,
        )  # fmt: skip
    return product_MN


@triton.jit
def sum_of_one(
    h, ids_MK, weights_MK, slots, units, experts_U, slots_U, answers, num_used, first_row, row_N,
    mask_N, STORED: tl.constexpr, DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr,
    MATRICES: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Some rows of a single token's weighted sum over its experts: [1, N] in float32.

    Each expert's row is summed by itself, wherever it is computed; then the weighted are added.
    """
    y_MN = tl.zeros([1, BLOCK_N], tl.float32)
    if CODE is not None and reads_ahead(K, W, BLOCK_I):
        start: tl.constexpr = DOWN_BIAS if HAS_BIAS else None
        y_MN = weighted_sum_of_one(
            h, ids_MK, weights_MK, slots, units, experts_U, slots_U, answers, num_used, row_N,
            mask_N, STORED, H, W, CODE, start, K, SHARE, BLOCK_N, BLOCK_I,
        )[None, :]  # fmt: skip
    elif CODE is not None:
        for at in range(num_used):
            y_MN += weight_of(experts_U, at, ids_MK, weights_MK) * row_of_one(
                h, slots, units, slots_U, answers, at, first_row, row_N, mask_N, STORED, DOWN,
                DOWN_BIAS, MATRICES, PATCHES, CODE, CHUNK, H, W, HAS_BIAS, SHARE, BLOCK_N, BLOCK_I,
            )  # fmt: skip
    else:
        for at in tl.static_range(K):
            if at < num_used:
                y_MN += weight_of(experts_U, at, ids_MK, weights_MK) * row_of_one(
                    h, slots, units, slots_U, answers, at, first_row, row_N, mask_N, STORED, DOWN,
                    DOWN_BIAS, MATRICES, PATCHES, CODE, CHUNK, H, W, HAS_BIAS, SHARE, BLOCK_N,
                    BLOCK_I,
                )  # fmt: skip
    return y_MN


@triton.jit
def sum_of_part(
    h, ids_MK, weights_MK, slots, units, experts_U, slots_U, num_used, num_tokens, part,
    first_row, row_N, mask_N, STORED: tl.constexpr, DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr,
    MATRICES: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr,
    W: tl.constexpr, E: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Some rows of several tokens' weighted sums over a range of experts: [M, N] in float32."""
    y_MN = tl.zeros([M, BLOCK_N], tl.float32)
    index_U = tl.arange(0, BLOCK_U)
    experts = tl.load(experts_U + index_U, mask=index_U < num_used, other=E)
    SPAN: tl.constexpr = (E + PARTS - 1) // PARTS
    first = part * SPAN
    at = tl.sum((experts < first).to(tl.int32), axis=0)
    end = tl.sum((experts < first + SPAN).to(tl.int32), axis=0)
    end = tl.minimum(end, num_used)
    while at < end:
        slot = tl.load(slots_U + at).to(tl.int64)
        expert = tl.load(experts_U + at)
        weight_M = tl.sum(tl.where(ids_MK == expert, weights_MK, 0.0), axis=1)
        product_MN = product_of(
            h + at * num_tokens * W, slots, units, slot, num_tokens, first_row, row_N, mask_N,
            STORED, DOWN, DOWN_BIAS, MATRICES, PATCHES, CODE, CHUNK, W, HAS_BIAS, M, BLOCK_N,
            BLOCK_I,
        )  # fmt: skip
        weighted_MN = weight_M[:, None] * product_MN
        y_MN += tl.where((weight_M != 0.0)[:, None], weighted_MN, 0.0)  # no others' NaN
        at += 1
    return y_MN


@triton.jit(
    do_not_specialize=["num_tokens", "first_part"],
    do_not_specialize_on_alignment=["experts_U", "slots_U", "counts"],
)
def down(
    h, y, ids, weights, slots, units, experts_U, slots_U, answers, counts, num_tokens, first_part,
    STORED: tl.constexpr, DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr,
    MATRICES: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr, CHUNK: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, E: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHARE: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Each token's weighted sum over its experts, ascending: y [B, H]. Grid (blocks of H, parts).

    PARTS > 1: over the experts of each part, from `first_part` on, float32 [PARTS, B, H], for
    `join`. A part is a range of experts, whoever uses them: a token's sum does not depend on who
    shares the batch. SHARE: of a single token, an expert without a slot was computed on the CPU;
    its row is in `answers`, float32 [U, H].
    """
    first_row = tl.program_id(0) * BLOCK_N
    row_N = first_row + tl.arange(0, BLOCK_N)
    mask_N = row_N < H
    token_M = tl.arange(0, M)
    k_K = tl.arange(0, BLOCK_K)
    pair_MK = token_M[:, None] * K + k_K[None, :]
    mask_MK = (token_M < num_tokens)[:, None] & (k_K < K)[None, :]
    ids_MK = tl.load(ids + pair_MK, mask=mask_MK, other=-1)
    weights_MK = tl.load(weights + pair_MK, mask=mask_MK, other=0.0).to(tl.float32)
    num_used = tl.load(counts)
    part = first_part + tl.program_id(1)
    if M == 1:
        y_MN = sum_of_one(
            h, ids_MK, weights_MK, slots, units, experts_U, slots_U, answers, num_used, first_row,
            row_N, mask_N, STORED, DOWN, DOWN_BIAS, MATRICES, PATCHES, CODE, CHUNK, H, W, K,
            HAS_BIAS, SHARE, BLOCK_N, BLOCK_I,
        )  # fmt: skip
    else:
        y_MN = sum_of_part(
            h, ids_MK, weights_MK, slots, units, experts_U, slots_U, num_used, num_tokens, part,
            first_row, row_N, mask_N, STORED, DOWN, DOWN_BIAS, MATRICES, PATCHES, CODE, CHUNK, W,
            E, HAS_BIAS, M, PARTS, BLOCK_U, BLOCK_N, BLOCK_I,
        )  # fmt: skip
    to_MN = (part * num_tokens + token_M)[:, None] * H + row_N[None, :]
    y_MN = y_MN.to(y.dtype.element_ty)
    tl.store(y + to_MN, y_MN, mask=(token_M < num_tokens)[:, None] & mask_N[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def join(
    parts, y, num_tokens, H: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the parts [PARTS, B, H], ascending: y [B, H]. Grid (B, blocks of H)."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        at = (part * num_tokens + token) * H + column
        sums += tl.load(parts + at, mask=column < H, other=0.0)
    tl.store(y + token * H + column, sums.to(y.dtype.element_ty), mask=column < H)
