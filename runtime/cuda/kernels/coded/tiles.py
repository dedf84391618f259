"""Words and scales of coded matrices, loaded from stored blocks as tiles [N, G, J].

The words of a row lie one after the other; the J of a group are what a thread loads at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.coded.decoding import (
    E4M3,
    E8M0,
    FP8,
    INT4,
    MXFP4,
    NVFP4,
    divided,
    e4m3,
    e8m0,
    half_e8m0,
)


@triton.constexpr_function
def group_of(kind: int, columns: int, width: int) -> int:
    """J: words of a row that a thread loads at once, 16 bytes of them at most."""
    words = 2 if kind == FP8.value else 4
    columns = columns if columns < width else 8 * words
    while (8 * words) % columns and columns % (8 * words):
        words //= 2
    return words


@triton.constexpr_function
def dtype_of(scale: int) -> tl.dtype:
    """The type in which kernels load scales of a format."""
    return (tl.float32, tl.bfloat16, tl.float16, tl.uint8, tl.uint8)[scale]


@triton.jit
def part_at(block, START: tl.constexpr, DTYPE: tl.constexpr):
    """The part of a stored block (int16) that starts at a byte."""
    return (block + START // 2).to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def words_of(
    block, rows_N, mask_N, group_G, WIDTH: tl.constexpr, CODE: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Words of some rows and groups of columns: [N, G, J]."""
    word_GJ = group_G[:, None] * J + tl.arange(0, J)[None, :]
    at_NGJ = rows_N[:, None, None] * (WIDTH // 8) + word_GJ[None, :, :]
    mask_NGJ = mask_N[:, None, None] & (word_GJ < WIDTH // 8)[None, :, :]
    WORD: tl.constexpr = tl.int64 if CODE.kind == FP8 else tl.int32
    return tl.load(part_at(block, CODE.codes, WORD) + at_NGJ, mask=mask_NGJ, other=0)


@triton.jit
def scale_at(
    block, rows_N, mask_N, column_G, WIDTH: tl.constexpr, CODE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scales (half of them for mxfp4) and zeros of some rows and columns: [N, G] in float32.

    WIDE: a thread loads neighbours together; else those of its own words.
    """
    COLUMNS: tl.constexpr = (WIDTH + CODE.columns - 1) // CODE.columns
    row_N = rows_N if CODE.kind == NVFP4 else rows_N // CODE.rows
    mask_NG = mask_N[:, None] & (column_G < COLUMNS)[None, :]
    at_NG = row_N[:, None] * COLUMNS + column_G[None, :]
    if not WIDE:
        at_NG = tl.max_contiguous(at_NG, [1, 1])
    scale_NG = tl.load(
        part_at(block, CODE.scales, dtype_of(CODE.scale)) + at_NG, mask=mask_NG, other=0
    )
    if CODE.scale == E8M0:
        exponent_NG = scale_NG.to(tl.int32)
        scale_NG = half_e8m0(exponent_NG) if CODE.kind == MXFP4 else e8m0(exponent_NG)
    elif CODE.scale == E4M3:
        scale_NG = e4m3(scale_NG.to(tl.int32))
    else:
        scale_NG = scale_NG.to(tl.float32)
    if CODE.kind == NVFP4:
        wholes = part_at(block, CODE.extra, tl.float32)
        whole_NG = tl.load(wholes + rows_N // CODE.rows, mask=mask_N, other=1.0)[:, None]
        scale_NG = divided(scale_NG, whole_NG) if CODE.divides else scale_NG * whole_NG
    zero_NG = tl.full([1, 1], 8.0, tl.float32)
    if CODE.kind == INT4 and CODE.extra >= 0:
        zeros = part_at(block, CODE.extra, tl.uint8)
        zero_NG = tl.load(zeros + at_NG, mask=mask_NG, other=0).to(tl.float32)
    return scale_NG, zero_NG


@triton.jit
def scales_of(
    block, rows_N, mask_N, group_G, WIDTH: tl.constexpr, CODE: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of words: float32 of a shape that broadcasts to [N, G, J]."""
    C: tl.constexpr = CODE.columns
    if C >= WIDTH or C % (8 * J) == 0:
        column_G = tl.zeros([1], tl.int32) if C >= WIDTH else group_G // (C // (8 * J))
        scale_NG, zero_NG = scale_at(block, rows_N, mask_N, column_G, WIDTH, CODE, False)
        scale_NGJ, zero_NGJ = scale_NG[:, :, None], zero_NG[:, :, None]
    else:
        SHARES: tl.constexpr = 8 * J // C
        share_J = (tl.arange(0, J) // (C // 8))[None, None, :]
        scale_NGJ = tl.full([1, 1, 1], 0.0, tl.float32)
        zero_NGJ = scale_NGJ
        for share in tl.static_range(SHARES):
            column_G = group_G * SHARES + share
            scale_NG, zero_NG = scale_at(block, rows_N, mask_N, column_G, WIDTH, CODE, False)
            scale_NGJ = tl.where(share_J == share, scale_NG[:, :, None], scale_NGJ)
            zero_NGJ = tl.where(share_J == share, zero_NG[:, :, None], zero_NGJ)
    return scale_NGJ, zero_NGJ
