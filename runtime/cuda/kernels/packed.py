"""Packed weights (see `packing`), decoded in registers: device functions of the kernels.

Eight neighbours of a row are decoded at a time, into four int32 words of two bfloat16 each:

    word      0       1       2       3
    weights   0, 2    1, 3    4, 6    5, 7

A word holds a code in place of the exponent, which makes it the weight times 2^-base; zeros and
patches decode to zero. Products make up for the factor: the vector is multiplied by 2^(base - 64)
and the sum by 2^64, so that neither leaves the range of float32. This is exact for activations
up to 2^64.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_P = tl.constexpr(128)
"""Most entries of patches at a time."""
UP_AGAIN = tl.constexpr(2.0**64)
"""The factor of sums of products with scaled vectors."""


@triton.jit
def words(low, codes, number: tl.constexpr):
    """Word `number` of eight weights, from their bytes (int64) and codes (int32)."""
    half = (low >> 32).to(tl.int32) if number >= 2 else low.to(tl.int32)
    if number == 0:
        code = codes << 7
    elif number == 1:
        code = codes << 3
    elif number == 2:
        code = codes >> 1
    else:
        code = codes >> 5
    if number % 2 == 0:
        rest = ((half & 0x00800080) << 8) | (half & 0x007F007F)
    else:
        rest = (half & -2147450880) | ((half >> 8) & 0x007F007F)
    return (code & 0x07800780) | rest


@triton.jit
def first_of(word):
    """The first weight of a word, in float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def second_of(word):
    """The second weight of a word, in float32."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def first_bits(word):
    """The bits of the first weight of a word, int16."""
    return word.to(tl.int16)


@triton.jit
def second_bits(word):
    """The bits of the second weight of a word, int16."""
    return (word >> 16).to(tl.int16)


@triton.jit
def first_half(word):
    """The first weight of a word, in bfloat16."""
    return first_bits(word).to(tl.bfloat16, bitcast=True)


@triton.jit
def second_half(word):
    """The second weight of a word, in bfloat16."""
    return second_bits(word).to(tl.bfloat16, bitcast=True)


@triton.jit
def side_by_side(w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7):
    """Every eighth entry from 0, 1, ... on, as [..., 2, 2, 2]: side by side when it is reshaped."""
    even = tl.join(tl.join(w_0, w_4), tl.join(w_2, w_6))
    odd = tl.join(tl.join(w_1, w_5), tl.join(w_3, w_7))
    return tl.join(even, odd)


@triton.jit
def eighths(x):
    """Every eighth entry of [..., 8] given as [..., 2, 2, 2], from 0, 2, 1, 3, 4, 6, 5, 7 on: in
    the order of the words.
    """
    even, odd = tl.split(x)
    x_04, x_26 = tl.split(even)
    x_15, x_37 = tl.split(odd)
    x_0, x_4 = tl.split(x_04)
    x_2, x_6 = tl.split(x_26)
    x_1, x_5 = tl.split(x_15)
    x_3, x_7 = tl.split(x_37)
    return x_0, x_2, x_1, x_3, x_4, x_6, x_5, x_7


@triton.jit
def scale_of(base):
    """2^(base - 64), in float32."""
    return ((base + 63) << 23).to(tl.float32, bitcast=True)


@triton.jit
def patches_in(block, MATRICES: tl.constexpr):
    """The patches of a stored block with so many units of matrices."""
    return (block + MATRICES * 3 // 4).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def base_at(block, unit, MATRICES: tl.constexpr, CHUNK: tl.constexpr, PATCHES: tl.constexpr):
    """The base of the matrix of a unit."""
    return tl.load(patches_in(block, MATRICES) + unit // CHUNK * PATCHES)


@triton.jit
def packed_at(block, at, mask, MATRICES: tl.constexpr):
    """Bytes and codes of the groups of eight number `at` of a stored block (int16)."""
    low = tl.load(block.to(tl.pointer_type(tl.int64), bitcast=True) + at, mask=mask, other=0)
    codes = (block + MATRICES // 2).to(tl.pointer_type(tl.int32), bitcast=True)
    return low, tl.load(codes + at, mask=mask, other=0)


@triton.jit
def packed_tile(
    block, rows_N, mask_N, eight_K, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MATRICES: tl.constexpr,
):  # fmt: skip
    """Bytes and codes of some rows and eights of columns of the matrix [*, WIDTH] at unit FIRST."""
    at_NK = (FIRST // 8 + rows_N * (WIDTH // 8))[:, None] + eight_K[None, :]
    mask_NK = mask_N[:, None] & (eight_K < WIDTH // 8)[None, :]
    return packed_at(block, at_NK, mask_NK, MATRICES)


@triton.jit
def patches_of(
    block, row, start, FIRST: tl.constexpr, WIDTH: tl.constexpr, MATRICES: tl.constexpr,
    CHUNK: tl.constexpr, PATCHES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Row (-1 for none), column and bits of some patches of a matrix's rows from `row` on: of its
    entries start .. start + ENTRIES.
    """
    first = (FIRST + row * WIDTH) // CHUNK * PATCHES
    entry_P = first + start + tl.arange(0, ENTRIES)
    mask_P = (entry_P % PATCHES != 0) & (entry_P < MATRICES // CHUNK * PATCHES)
    patch_P = tl.load(patches_in(block, MATRICES) + entry_P, mask=mask_P, other=0)
    unit_P = entry_P // PATCHES * CHUNK + (patch_P >> 16) - FIRST
    row_P = unit_P // WIDTH
    return tl.where(patch_P != 0, row_P, -1), unit_P - row_P * WIDTH, patch_P


@triton.constexpr_function
def num_entries(rows: int, width: int, chunk: int, patches: int) -> int:
    """Patch entries to look at for `rows` neighbouring rows that start at a multiple of `rows`
    (those of one row more where they do not).
    """
    whole, rest = divmod(rows * width, chunk)
    return (whole + 2 if rest else whole) * patches


@triton.jit
def patched_one(
    x, block, row, rows_N, FIRST: tl.constexpr, WIDTH: tl.constexpr, MATRICES: tl.constexpr,
    CHUNK: tl.constexpr, PATCHES: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The patches' share of the products of some of SPAN rows with one vector x: [N], float32."""
    sums_N = tl.zeros([N], tl.float32)
    for start in tl.static_range(0, num_entries(SPAN, WIDTH, CHUNK, PATCHES), BLOCK_P):
        row_P, column_P, patch_P = patches_of(
            block, row, start, FIRST, WIDTH, MATRICES, CHUNK, PATCHES, BLOCK_P
        )
        x_P = tl.load(x + column_P, mask=row_P >= 0, other=0.0).to(tl.float32)
        product_P = first_of(patch_P) * x_P
        is_in_NP = rows_N[:, None] == row_P[None, :]
        sums_N += tl.sum(tl.where(is_in_NP, product_P[None, :], 0.0), axis=1)
    return sums_N


@triton.jit
def add_patches(
    sums_MN, x, row_M, mask_M, block, row, rows_N, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MATRICES: tl.constexpr, CHUNK: tl.constexpr, PATCHES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Add the same for several vectors, some rows of x [*, WIDTH], to sums [M, N]."""
    ENTRIES: tl.constexpr = BLOCK_P if sums_MN.shape[0] <= 32 else BLOCK_P // 2  # fit registers
    for start in range(0, num_entries(SPAN, WIDTH, CHUNK, PATCHES), ENTRIES):
        row_P, column_P, patch_P = patches_of(
            block, row, start, FIRST, WIDTH, MATRICES, CHUNK, PATCHES, ENTRIES
        )
        mask_MP = mask_M[:, None] & (row_P >= 0)[None, :]
        x_MP = tl.load(x + row_M[:, None] * WIDTH + column_P[None, :], mask=mask_MP, other=0.0)
        weight_P = first_half(patch_P)
        weight_PN = tl.where(row_P[:, None] == rows_N[None, :], weight_P[:, None], 0.0)
        sums_MN = tl.dot(x_MP, weight_PN, sums_MN)
    return sums_MN


@triton.jit
def add_word(sums_NK, word_NK, first_K, second_K):
    """Add the products with the two weights of each word, element by element."""
    sums_NK += first_of(word_NK) * first_K[None, :]
    sums_NK += second_of(word_NK) * second_K[None, :]
    return sums_NK


@triton.jit
def add_products(
    sums_NK, x, block, rows_N, mask_N, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MATRICES: tl.constexpr, CHUNK: tl.constexpr, PATCHES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the products of some rows with x to the sums [N, BLOCK_K / 8].

    Patches are left out, and all values are 1 / UP_AGAIN of the true ones.
    """
    scale = scale_of(base_at(block, FIRST, MATRICES, CHUNK, PATCHES))
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        eight_K = start // 8 + tl.arange(0, BLOCK_K // 8)
        low, codes = packed_tile(block, rows_N, mask_N, eight_K, FIRST, WIDTH, MATRICES)
        column_K = start + tl.arange(0, BLOCK_K)
        x_K = tl.load(x + column_K, mask=column_K < WIDTH, other=0.0).to(tl.float32) * scale
        x_0, x_2, x_1, x_3, x_4, x_6, x_5, x_7 = eighths(tl.reshape(x_K, (BLOCK_K // 8, 2, 2, 2)))
        sums_NK = add_word(sums_NK, words(low, codes, 0), x_0, x_2)
        sums_NK = add_word(sums_NK, words(low, codes, 1), x_1, x_3)
        sums_NK = add_word(sums_NK, words(low, codes, 2), x_4, x_6)
        sums_NK = add_word(sums_NK, words(low, codes, 3), x_5, x_7)
    return sums_NK


@triton.jit
def dot_word(sums_MN, word_NK, first_MK, second_MK):
    """Add the matrix products with the two weights of each word."""
    sums_MN = tl.dot(first_MK, tl.trans(first_half(word_NK)), sums_MN)
    return tl.dot(second_MK, tl.trans(second_half(word_NK)), sums_MN)


@triton.jit
def packed_rows_of(
    x, block, row, rows_N, mask_N, num_tokens, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MATRICES: tl.constexpr, CHUNK: tl.constexpr, PATCHES: tl.constexpr, SPAN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X [*, WIDTH] times some rows of the matrix at unit FIRST: [M, N] in float32.

    row: the first of the SPAN neighbours that the rows are among.
    """
    if M == 1:
        sums_NK = tl.zeros([N, BLOCK_K // 8], tl.float32)
        sums_NK = add_products(
            sums_NK, x, block, rows_N, mask_N, FIRST, WIDTH, MATRICES, CHUNK, PATCHES, BLOCK_K
        )  # fmt: skip
        patched_N = patched_one(
            x, block, row, rows_N, FIRST, WIDTH, MATRICES, CHUNK, PATCHES, SPAN, N
        )
        product_MN = (tl.sum(sums_NK, axis=1) * UP_AGAIN + patched_N)[None, :]
    else:
        token_M = tl.arange(0, M)
        scale = scale_of(base_at(block, FIRST, MATRICES, CHUNK, PATCHES))
        sums_MN = tl.zeros([M, N], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            eight_K = start // 8 + tl.arange(0, BLOCK_K // 8)
            low, codes = packed_tile(block, rows_N, mask_N, eight_K, FIRST, WIDTH, MATRICES)
            column_K = start + tl.arange(0, BLOCK_K)
            mask_MK = (token_M < num_tokens)[:, None] & (column_K < WIDTH)[None, :]
            x_MK = tl.load(
                x + token_M[:, None] * WIDTH + column_K[None, :], mask=mask_MK, other=0.0
            )
            x_MK = (x_MK.to(tl.float32) * scale).to(tl.bfloat16)
            x_0, x_2, x_1, x_3, x_4, x_6, x_5, x_7 = eighths(
                tl.reshape(x_MK, (M, BLOCK_K // 8, 2, 2, 2))
            )
            sums_MN = dot_word(sums_MN, words(low, codes, 0), x_0, x_2)
            sums_MN = dot_word(sums_MN, words(low, codes, 1), x_1, x_3)
            sums_MN = dot_word(sums_MN, words(low, codes, 2), x_4, x_6)
            sums_MN = dot_word(sums_MN, words(low, codes, 3), x_5, x_7)
        product_MN = sums_MN * UP_AGAIN + add_patches(
            tl.zeros([M, N], tl.float32), x, token_M, token_M < num_tokens, block, row, rows_N,
            FIRST, WIDTH, MATRICES, CHUNK, PATCHES, SPAN,
        )  # fmt: skip
    return product_MN
