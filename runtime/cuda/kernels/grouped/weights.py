"""Tiles of weights [N, K] as the checkpoint has them, whatever a stored block keeps.

Decoded in registers, each weight costs a few instructions for every tile of rows; unpacked before,
it costs memory traffic once. See `prefill.tiling` for which is taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.coded.decoding import BF16, INT4, INTERPRETED, MXFP4, spread_e2m1
from runtime.cuda.kernels.coded.tiles import group_of, scales_of, words_of
from runtime.cuda.kernels.packed import (
    first_bits,
    first_half,
    packed_tile,
    second_bits,
    second_half,
    side_by_side,
    words,
)
from runtime.cuda.kernels.unpack import based, weights_in_turn
from runtime.cuda.kernels.unpacked import tile_of

TWO_MINUS_ZEROS = tl.constexpr(-2147450880)  # 0x80008000
TWO_ONES, TWO_MINUS_ONES = tl.constexpr(0x3F803F80), tl.constexpr(-1082081408)  # 0xBF80BF80
TWO_128, TWO_MINUS_128 = tl.constexpr(0x43004300), tl.constexpr(-1023360256)  # 0xC300C300
TWO_MINUS_136 = tl.constexpr(-1022835960)  # 0xC308C308
TWO_2_TO_THE_127 = tl.constexpr(0x7F007F00)


@triton.jit
def two_sums(factors, others, terms):
    """Two bfloat16 in an int32 times two others, and two terms added, rounded once."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [factors, others, terms], tl.int32, True, 1
    )


@triton.jit
def two_of(value):
    """A number that bfloat16 holds, in float32, as two of them in an int32."""
    half = value.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return half | (half << 16)


@triton.jit
def times_two_to_the(base, word):
    """Two bfloat16 of a packed word times 2^base, which is exact: zeros stay zeros."""
    if INTERPRETED:
        word = based(word, base)
    else:
        word = two_sums(word, (base + 127) * 0x00800080, TWO_MINUS_ZEROS)
    return word


@triton.jit
def packed_weights(
    units, rows_N, mask_N, start, base, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MATRICES: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights of the packed matrix at unit FIRST, zero where there is a patch: [N, K]."""
    eight_K = start // 8 + tl.arange(0, BLOCK_K // 8)
    low, codes = packed_tile(units, rows_N, mask_N, eight_K, FIRST, WIDTH, MATRICES)
    w_02 = times_two_to_the(base, words(low, codes, 0))
    w_13 = times_two_to_the(base, words(low, codes, 1))
    w_46 = times_two_to_the(base, words(low, codes, 2))
    w_57 = times_two_to_the(base, words(low, codes, 3))
    weights = side_by_side(
        first_half(w_02), first_half(w_13), second_half(w_02), second_half(w_13),
        first_half(w_46), first_half(w_57), second_half(w_46), second_half(w_57),
    )  # fmt: skip
    return tl.reshape(weights, (N, BLOCK_K))


@triton.constexpr_function
def rounds_once(kind: int, scale: int, product: int, dtype: tl.dtype) -> bool:
    """Whether bfloat16 holds codes and scales, so that its product is the weight."""
    is_int = kind == INT4.value and scale == product == BF16.value
    return dtype == tl.bfloat16 and (is_int or kind == MXFP4.value)


@triton.jit
def lifted_pair(word):
    """128 + code in bfloat16, of the codes that are lowest in both halves of a word."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [word, 0x000F000F, TWO_128], tl.int32, True, 1
    )


@triton.jit
def int4_pair(word, pair: tl.constexpr, scales, zeros, HAS_ZEROS: tl.constexpr):
    """Weights `pair` and `pair` + 4 of a word in two bfloat16. scales, zeros: as `two_of`."""
    lifted = lifted_pair(word >> (4 * pair))
    if HAS_ZEROS:
        codes = two_sums(zeros, TWO_MINUS_ONES, two_sums(lifted, TWO_ONES, TWO_MINUS_128))
    else:
        codes = two_sums(lifted, TWO_ONES, TWO_MINUS_136)
    return two_sums(codes, scales, TWO_MINUS_ZEROS)


@triton.jit
def mxfp4_pair(word, pair: tl.constexpr, halves):
    """Weights `pair` and `pair` + 4 of a word in two bfloat16. halves: of scales, as `two_of`."""
    doubled = two_sums(spread_e2m1(word, pair), TWO_2_TO_THE_127, TWO_MINUS_ZEROS)
    return two_sums(doubled, halves, TWO_MINUS_ZEROS)


@triton.jit
def weight_pair(word, pair: tl.constexpr, scales, zeros, CODE: tl.constexpr):
    """Weights `pair` and `pair` + 4 of a word in two bfloat16."""
    if CODE.kind == INT4:
        weights = int4_pair(word, pair, scales, zeros, CODE.extra >= 0)
    else:
        weights = mxfp4_pair(word, pair, scales)
    return weights


@triton.jit
def coded_weights(
    units, rows_N, mask_N, start, WIDTH: tl.constexpr, CODE: tl.constexpr, DTYPE: tl.constexpr,
    N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights of a matrix in codes: [N, K]."""
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, WIDTH)
    group_G = start // (8 * J) + tl.arange(0, BLOCK_K // (8 * J))
    words = words_of(units, rows_N, mask_N, group_G, WIDTH, CODE, J)
    scale, zero = scales_of(units, rows_N, mask_N, group_G, WIDTH, CODE, J)
    if rounds_once(CODE.kind, CODE.scale, CODE.product, DTYPE) and not INTERPRETED:
        scales, zeros = two_of(scale), two_of(zero)
        w_04 = weight_pair(words, 0, scales, zeros, CODE)
        w_15 = weight_pair(words, 1, scales, zeros, CODE)
        w_26 = weight_pair(words, 2, scales, zeros, CODE)
        w_37 = weight_pair(words, 3, scales, zeros, CODE)
        weights = side_by_side(
            first_bits(w_04), first_bits(w_15), first_bits(w_26), first_bits(w_37),
            second_bits(w_04), second_bits(w_15), second_bits(w_26), second_bits(w_37),
        )  # fmt: skip
        weights_NK = tl.reshape(weights, (N, BLOCK_K)).to(DTYPE, bitcast=True)
    else:
        weights = weights_in_turn(words, scale, zero, CODE, DTYPE)
        weights_NK = tl.reshape(weights, (N, BLOCK_K)).to(DTYPE)
    return weights_NK  # changed after their shape: Triton 3.6 fails otherwise


@triton.jit
def weights_of_rows(
    block, units, rows_N, mask_N, start, base, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MATRICES: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K columns from `start` on of some rows of a matrix [*, WIDTH], without its patches.

    block: the stored block in the weights' type, with the matrix at element FIRST; units: the same
    block, int16.
    """
    if PATCHES > 0:
        weights_NK = packed_weights(
            units, rows_N, mask_N, start, base, FIRST, WIDTH, MATRICES, N, BLOCK_K
        )
    elif CODE is not None:
        DTYPE: tl.constexpr = block.dtype.element_ty
        weights_NK = coded_weights(units, rows_N, mask_N, start, WIDTH, CODE, DTYPE, N, BLOCK_K)
    else:
        weights_NK = tile_of(block + FIRST, rows_N, mask_N, start + tl.arange(0, BLOCK_K), WIDTH)
    return weights_NK
