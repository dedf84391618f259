"""Weights that lie in memory as they are, by rows and tiles: the twin of `packed`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def record_elements(slots, UNITS: tl.constexpr):
    """Length of a block of so many int16, in elements of the slots' type."""
    return UNITS * 16 // slots.dtype.element_ty.primitive_bitwidth


@triton.jit
def tile_of(matrix, rows_N, mask_N, column_K, WIDTH: tl.constexpr):
    """Some rows and columns of a matrix [*, WIDTH]."""
    mask_NK = mask_N[:, None] & (column_K < WIDTH)[None, :]
    return tl.load(matrix + rows_N[:, None] * WIDTH + column_K[None, :], mask=mask_NK, other=0.0)


@triton.jit
def rows_of(
    x, matrix, rows_N, mask_N, num_tokens, H: tl.constexpr,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """X times some rows of a matrix [*, H]: [M, N] in float32.

    One token is a plain sum of products, several are a matrix product padded to M.
    """
    if M == 1:
        sums_NK = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        for start in tl.static_range(0, H, BLOCK_H):
            column_K = start + tl.arange(0, BLOCK_H)
            tile_NK = tile_of(matrix, rows_N, mask_N, column_K, H)
            x_K = tl.load(x + column_K, mask=column_K < H, other=0.0)
            sums_NK += tile_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]
        sums_MN = tl.sum(sums_NK, axis=1)[None, :]
    else:
        token_M = tl.arange(0, M)
        sums_MN = tl.zeros([M, BLOCK_N], tl.float32)
        for start in range(0, H, BLOCK_H):
            column_K = start + tl.arange(0, BLOCK_H)
            tile_NK = tile_of(matrix, rows_N, mask_N, column_K, H)
            mask_MK = (token_M < num_tokens)[:, None] & (column_K < H)[None, :]
            x_MK = tl.load(x + token_M[:, None] * H + column_K[None, :], mask=mask_MK, other=0.0)
            sums_MN += tl.dot(x_MK, tl.trans(tile_NK), input_precision="ieee")
    return sums_MN
