"""Weights as the checkpoint has them, whatever a stored block keeps, in parts of a tile's columns.

Decoded in registers, each weight costs a few instructions for every tile of rows; unpacked before,
it costs memory traffic once. See `prefill.tiling` for which is taken. Nothing here moves a value
from one thread to another: words are loaded as the tensor cores want their weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.coded.decoding import (
    BF16,
    FP8,
    INT4,
    INTERPRETED,
    MXFP4,
    spread_e2m1,
    weights_of,
)
from runtime.cuda.kernels.coded.tiles import part_at, scale_at
from runtime.cuda.kernels.packed import (
    first_bits,
    first_half,
    packed_tile,
    patches_in,
    second_bits,
    second_half,
    words,
)
from runtime.cuda.kernels.unpack import based
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


@triton.constexpr_function
def in_pairs(kind: int, scale: int, product: int, dtype: tl.dtype) -> bool:
    """Whether two codes are decoded at a time: bfloat16 holds them and their scales, so that its
    product is the weight.
    """
    is_int = kind == INT4.value and scale == product == BF16.value
    return dtype == tl.bfloat16 and (is_int or kind == MXFP4.value) and not INTERPRETED.value


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
def base_of(
    units, rows_N, FIRST: tl.constexpr, MATRICES: tl.constexpr, CHUNK: tl.constexpr,
    PATCHES: tl.constexpr,
):  # fmt: skip
    """The base of the packed matrix at unit FIRST, for each row: [N, 1]."""
    base = patches_in(units, MATRICES) + FIRST // CHUNK * PATCHES
    return tl.load(base + 0 * rows_N[:, None])


@triton.constexpr_function
def num_scales(columns: int, width: int, tile: int) -> int:
    """Scales of a row for so many columns: each word's own where they do not divide each other."""
    if columns >= width or columns % tile == 0:
        return 1
    return tile // columns if tile % columns == 0 else tile // 8


@triton.jit
def for_words(scale_NG, N: tl.constexpr, WORDS: tl.constexpr):
    """Scales as [N, WORDS]."""
    G: tl.constexpr = scale_NG.shape[1]
    return tl.reshape(tl.broadcast_to(scale_NG[:, :, None], (N, G, WORDS // G)), (N, WORDS))


@triton.jit
def coded_words(
    units, rows_N, mask_N, start, WIDTH: tl.constexpr, CODE: tl.constexpr, DTYPE: tl.constexpr,
    N: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Words of some rows of a matrix in codes, [N, WORDS], their scales and their zeros."""
    WORD: tl.constexpr = tl.int64 if CODE.kind == FP8 else tl.int32
    at_K = start // 8 + tl.arange(0, WORDS)
    words_NK = tile_of(part_at(units, CODE.codes, WORD), rows_N, mask_N, at_K, WIDTH // 8)
    C: tl.constexpr = CODE.columns
    G: tl.constexpr = num_scales(C, WIDTH, 8 * WORDS)
    if C >= WIDTH:
        column_G = tl.zeros([1], tl.int32)
    elif G == WORDS:
        column_G = (start + 8 * tl.arange(0, G)) // C
    else:
        column_G = start // C + tl.arange(0, G)
    scale_NG, zero_NG = scale_at(units, rows_N, mask_N, column_G, WIDTH, CODE, True)
    if in_pairs(CODE.kind, CODE.scale, CODE.product, DTYPE):
        scale_NG, zero_NG = two_of(scale_NG), two_of(zero_NG)
    scale_NK = for_words(scale_NG, N, WORDS)
    zero_NK = zero_NG
    if CODE.kind == INT4 and CODE.extra >= 0:
        zero_NK = for_words(zero_NG, N, WORDS)
    return words_NK, scale_NK, zero_NK


@triton.jit
def stored_tile(
    block, units, rows_N, mask_N, start, base, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MATRICES: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What `part_of` makes weights of: BLOCK_K columns from `start` on of some rows of a matrix
    [*, WIDTH], as they are stored.

    block: the stored block in the weights' type, with the matrix at element FIRST; units: the same
    block, int16.
    """
    if PATCHES > 0:
        eight_K = start // 8 + tl.arange(0, BLOCK_K // 8)
        first, second = packed_tile(units, rows_N, mask_N, eight_K, FIRST, WIDTH, MATRICES)
        third = base
    elif CODE is not None:
        DTYPE: tl.constexpr = block.dtype.element_ty
        first, second, third = coded_words(
            units, rows_N, mask_N, start, WIDTH, CODE, DTYPE, N, BLOCK_K // 8
        )
    else:
        first = tile_of(block + FIRST, rows_N, mask_N, start + tl.arange(0, BLOCK_K), WIDTH)
        second, third = 0, 0
    return first, second, third


@triton.jit
def part_of(
    first, second, third, part: tl.constexpr, PATCHES: tl.constexpr, CODE: tl.constexpr,
    DTYPE: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part of a tile's weights, [N, BLOCK_K / 4], without patches; all of a plain one."""
    if PATCHES > 0:
        word = times_two_to_the(third, words(first, second, part))
        weights_NK = tl.reshape(tl.join(first_half(word), second_half(word)), (N, BLOCK_K // 4))
    elif CODE is None:
        weights_NK = first
    elif in_pairs(CODE.kind, CODE.scale, CODE.product, DTYPE):
        word = weight_pair(first, part, second, third, CODE)
        bits = tl.join(first_bits(word), second_bits(word))
        weights_NK = tl.reshape(bits, (N, BLOCK_K // 4)).to(DTYPE, bitcast=True)
    else:
        one, other = weights_of(first, part, second, third, CODE.kind, CODE.product, DTYPE, True)
        weights_NK = tl.reshape(tl.join(one, other), (N, BLOCK_K // 4)).to(DTYPE)
    return weights_NK  # changed after their shape: Triton 3.6 fails otherwise
