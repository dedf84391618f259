"""Tiles of weights [N, K] as the checkpoint has them, whatever a stored block keeps.

Decoded in registers, each weight costs a few instructions for every tile of rows; unpacked before,
it costs memory traffic once. See `prefill.tiling` for which is taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.coded.decoding import INTERPRETED
from runtime.cuda.kernels.coded.tiles import group_of, scales_of, words_of
from runtime.cuda.kernels.packed import first_half, packed_tile, second_half, words
from runtime.cuda.kernels.unpack import based, weights_in_turn
from runtime.cuda.kernels.unpacked import tile_of

TWO_MINUS_ZEROS = tl.constexpr(-2147450880)  # 0x80008000


@triton.jit
def times_two_to_the(base, word):
    """Two bfloat16 of a packed word times 2^base, which is exact: zeros stay zeros."""
    if INTERPRETED:
        word = based(word, base)
    else:
        factor = (base + 127) * 0x00800080
        word = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [word, factor, TWO_MINUS_ZEROS],
            tl.int32, True, 1,
        )  # fmt: skip
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
    w_0, w_4 = first_half(w_02), first_half(w_46)
    w_2, w_6 = second_half(w_02), second_half(w_46)
    w_1, w_5 = first_half(w_13), first_half(w_57)
    w_3, w_7 = second_half(w_13), second_half(w_57)
    even = tl.join(tl.join(w_0, w_4), tl.join(w_2, w_6))
    odd = tl.join(tl.join(w_1, w_5), tl.join(w_3, w_7))
    return tl.reshape(tl.join(even, odd), (N, BLOCK_K))


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
    weights = weights_in_turn(words, scale, zero, CODE, DTYPE)
    return tl.reshape(weights, (N, BLOCK_K)).to(DTYPE)  # in this order: Triton 3.6 fails otherwise


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
