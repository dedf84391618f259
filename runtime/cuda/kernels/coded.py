"""Matrices kept in codes, decoded in registers: their places in a stored block, and products.

Codes are loaded as tiles [N, G, J] of words, a word being eight codes: int32 (4 bits) or int64 (8).
The words of a row lie one after the other; the J of a group are what a thread loads at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from runtime.cuda.kernels.decoding import (
    BF16, E4M3, E8M0, F16, F32, FP8, INT4, MXFP4, NVFP4, e4m3, e8m0, float_code, lift, weight,
    with_nan,
)  # fmt: skip
from runtime.cuda.kernels.packed import eighths
from runtime.weights.encodings.coded import CodedMatrix
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding

KINDS = {
    "mxfp4": MXFP4.value,
    "fp8-block": FP8.value,
    "int4-group": INT4.value,
    "nvfp4": NVFP4.value,
}
"""Encodings that kernels decode, by name."""
SCALE_FORMATS = {
    torch.float32: F32.value,
    torch.bfloat16: BF16.value,
    torch.float16: F16.value,
    torch.uint8: E8M0.value,
    torch.float8_e8m0fnu: E8M0.value,
    torch.float8_e4m3fn: E4M3.value,
}
EIGHT = 8
"""Codes that are decoded together: neighbours in a row, which share their scale."""


class Code(NamedTuple):
    """A coded matrix in a stored block; a compile-time constant of kernels."""

    kind: int
    """One of KINDS."""
    codes: int
    """Byte at which the codes start in the block, a multiple of 128; so for the other parts."""
    scales: int
    extra: int
    """Zeros (int4) or global scales (nvfp4); -1 where there are none."""
    rows: int
    """Rows that share a scale (nvfp4: a global scale)."""
    columns: int
    """Columns that share a scale."""
    scale: int
    """One of SCALE_FORMATS."""
    divides: bool
    """Global scales divide."""

    @staticmethod
    def of(encoding: Encoding, starts: Mapping[str, int]) -> Code:
        """The code of a matrix whose parts start at these bytes of a stored block."""
        (extra,) = [starts[name] for name in starts if name not in (CODES, SCALES)] or [-1]
        kind = KINDS[encoding.name]
        fixed = {MXFP4.value: torch.uint8, NVFP4.value: torch.float8_e4m3fn}
        scale = fixed[kind] if kind in fixed else getattr(encoding, "scale")  # noqa: B009
        return Code(
            kind, starts[CODES], starts[SCALES], extra, encoding.rows, encoding.columns,
            SCALE_FORMATS[scale], bool(getattr(encoding, "divides", False)),
        )  # fmt: skip


def reason_against(matrix: CodedMatrix) -> str | None:
    """Why kernels cannot decode a matrix; None if they can."""
    encoding, width = matrix.encoding, matrix.shape[1]
    if encoding.name not in KINDS:
        return f"no kernel decodes {encoding.name}"
    if width % EIGHT or (encoding.columns % EIGHT and encoding.columns < width):
        return (
            f"kernels decode {EIGHT} codes at a time: rows of {width} in groups of "
            f"{encoding.columns} have no kernel"
        )
    return None


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
def eights_of(
    block, rows_N, mask_N, group_G, WIDTH: tl.constexpr, CODE: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Words of some rows and groups of columns: [N, G, J]."""
    word_GJ = group_G[:, None] * J + tl.arange(0, J)[None, :]
    at_NGJ = rows_N[:, None, None] * (WIDTH // 8) + word_GJ[None, :, :]
    mask_NGJ = mask_N[:, None, None] & (word_GJ < WIDTH // 8)[None, :, :]
    WORD: tl.constexpr = tl.int64 if CODE.kind == FP8 else tl.int32
    return tl.load(part_at(block, CODE.codes, WORD) + at_NGJ, mask=mask_NGJ, other=0)


@triton.jit
def scale_at(block, rows_N, mask_N, column_G, WIDTH: tl.constexpr, CODE: tl.constexpr):
    """Scales and zeros of some rows and columns of scales: [N, G] in float32."""
    COLUMNS: tl.constexpr = (WIDTH + CODE.columns - 1) // CODE.columns
    row_N = rows_N if CODE.kind == NVFP4 else rows_N // CODE.rows
    mask_NG = mask_N[:, None] & (column_G < COLUMNS)[None, :]
    at_NG = row_N[:, None] * COLUMNS + column_G[None, :]
    at_NG = tl.max_contiguous(at_NG, [1, 1])  # a thread loads the scales of its own words
    scale_NG = tl.load(part_at(block, CODE.scales, dtype_of(CODE.scale)) + at_NG, mask=mask_NG, other=0)
    if CODE.scale == E8M0:
        scale_NG = e8m0(scale_NG.to(tl.int32))
    elif CODE.scale == E4M3:
        scale_NG = e4m3(scale_NG.to(tl.int32))
    else:
        scale_NG = scale_NG.to(tl.float32)
    if CODE.kind == NVFP4:
        wholes = part_at(block, CODE.extra, tl.float32)
        whole_NG = tl.load(wholes + rows_N // CODE.rows, mask=mask_N, other=1.0)[:, None]
        scale_NG = tl.div_rn(scale_NG, whole_NG) if CODE.divides else scale_NG * whole_NG
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
        scale_NG, zero_NG = scale_at(block, rows_N, mask_N, column_G, WIDTH, CODE)
        return scale_NG[:, :, None], zero_NG[:, :, None]
    SHARES: tl.constexpr = 8 * J // C
    scale_NGJ = tl.full([1, 1, 1], 0.0, tl.float32)
    zero_NGJ = scale_NGJ
    share_J = (tl.arange(0, J) // (C // 8))[None, None, :]
    for share in tl.static_range(SHARES):
        column_G = group_G * SHARES + share
        scale_NG, zero_NG = scale_at(block, rows_N, mask_N, column_G, WIDTH, CODE)
        scale_NGJ = tl.where(share_J == share, scale_NG[:, :, None], scale_NGJ)
        zero_NGJ = tl.where(share_J == share, zero_NG[:, :, None], zero_NGJ)
    return scale_NGJ, zero_NGJ


@triton.constexpr_function
def hoists(kind: int, dtype: tl.dtype) -> bool:
    """Whether scales may be left to sums of products: powers of two, by which nothing rounds."""
    return kind == MXFP4.value and dtype != tl.float16


@triton.jit
def add_coded(
    sums_NGJ, x, factor, block, rows_N, mask_N, WIDTH: tl.constexpr, CODE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the products of some rows of a matrix [*, WIDTH] with factor * x to sums [N, G, J]."""
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, WIDTH)
    G: tl.constexpr = BLOCK_K // (8 * J)
    DTYPE: tl.constexpr = x.dtype.element_ty
    HOISTS: tl.constexpr = hoists(CODE.kind, DTYPE)
    LIFT: tl.constexpr = lift(CODE.kind)
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        group_G = start // (8 * J) + tl.arange(0, G)
        eight = eights_of(block, rows_N, mask_N, group_G, WIDTH, CODE, J)
        scale, zero = scales_of(block, rows_N, mask_N, group_G, WIDTH, CODE, J)
        column_K = start + tl.arange(0, BLOCK_K)
        x_K = tl.load(x + column_K, mask=column_K < WIDTH, other=0.0).to(tl.float32)
        x_K *= factor * LIFT if HOISTS else factor
        x_0, x_2, x_1, x_3, x_4, x_6, x_5, x_7 = eighths(tl.reshape(x_K, (G, J, 2, 2, 2)))
        x_GJ = x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7
        if HOISTS:
            products = float_code(eight, 0, CODE.kind) * x_GJ[0][None, :, :]
            for number in tl.static_range(1, 8):
                products += float_code(eight, number, CODE.kind) * x_GJ[number][None, :, :]
            sums_NGJ += products * scale
        else:
            scale *= LIFT
            if CODE.kind == FP8:
                scale = with_nan(scale, eight)
            for number in tl.static_range(8):
                w = weight(eight, number, scale, zero, CODE.kind, CODE.scale, DTYPE, True)
                sums_NGJ += w * x_GJ[number][None, :, :]
    return sums_NGJ


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
        sums_NGJ = tl.zeros([N, G, J], tl.float32)
        sums_NGJ = add_coded(sums_NGJ, x, 1.0, block, rows_N, mask_N, WIDTH, CODE, BLOCK_K)
        return sum_over(sums_NGJ)[None, :]
    token_M = tl.arange(0, M)
    sums_MN = tl.zeros([M, N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        column_K = start + tl.arange(0, BLOCK_K)
        mask_MK = (token_M < num_tokens)[:, None] & (column_K < WIDTH)[None, :]
        x_MK = tl.load(x + token_M[:, None] * WIDTH + column_K[None, :], mask=mask_MK, other=0.0)
        group_G = start // (8 * J) + tl.arange(0, G)
        sums_MN = add_coded_dots(
            sums_MN, x_MK, block, rows_N, mask_N, group_G, WIDTH, CODE, M, N, BLOCK_K
        )
    return sums_MN


@triton.jit
def add_coded_dots(
    sums_MN, x_MK, block, rows_N, mask_N, group_G, WIDTH: tl.constexpr, CODE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the products of BLOCK_K columns of some rows with those of X."""
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, WIDTH)
    DTYPE: tl.constexpr = x_MK.dtype
    eight = eights_of(block, rows_N, mask_N, group_G, WIDTH, CODE, J)
    scale, zero = scales_of(block, rows_N, mask_N, group_G, WIDTH, CODE, J)
    scale *= lift(CODE.kind)
    if CODE.kind == FP8:
        scale = with_nan(scale, eight)
    x_0, x_2, x_1, x_3, x_4, x_6, x_5, x_7 = eighths(tl.reshape(x_MK, (M, BLOCK_K // 8, 2, 2, 2)))
    x_ME = x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7
    for number in tl.static_range(8):
        w = weight(eight, number, scale, zero, CODE.kind, CODE.scale, DTYPE, True)
        w_NE = tl.reshape(w, (N, BLOCK_K // 8)).to(DTYPE)
        sums_MN = tl.dot(x_ME[number], tl.trans(w_NE), sums_MN, input_precision="ieee")
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
