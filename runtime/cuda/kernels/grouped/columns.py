"""Orders of columns.

Weights that are stored in words of eight are decoded two at a time. Where the columns of a vector
lie in that order as well, these two are neighbours in a product, and go to the tensor cores as they
are. Of 64 columns, which are the eight words 0..7, 8..15, ..., 56..63:

    NATURAL   0 1 2 3 ...
    NEAR      0 2   8 10  ...  56 58 |  1 3   9 11  ... |  4 6  12 14  ... |  5 7  13 15  ...  61 63
    FAR       0 4   8 12  ...  56 60 |  1 5   9 13  ... |  2 6  10 14  ... |  3 7  11 15  ...  59 63
              part 0                    part 1             part 2             part 3

Vectors in such an order are as long as whole 64s, and zero where there is no column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.coded import Code
from runtime.cuda.kernels.coded.decoding import FP8
from runtime.cuda.kernels.unpacked import tile_of

NATURAL, NEAR, FAR = (tl.constexpr(order) for order in range(3))


def order_of(patches: int, code: Code | None) -> int:
    """The order in which a matrix's weights are decoded; patches: of a packed chunk, or 0."""
    if code is None:
        return int((NEAR if patches else NATURAL).value)
    return int((NEAR if code.kind == FP8.value else FAR).value)


@triton.constexpr_function
def length_of(columns: int, order: int) -> int:
    """The length of a vector of so many columns."""
    return columns if order == NATURAL.value else (columns + 63) // 64 * 64


@triton.constexpr_function
def parts_of(order: int) -> int:
    """Parts of a tile's columns that are multiplied one after the other."""
    return 1 if order == NATURAL.value else 4


@triton.jit
def place_of(column, ORDER: tl.constexpr):
    """Where a column lies, in bits: the part, the word, and which of the two."""
    word = (column & -64) | ((column & 56) >> 2)
    if ORDER == NEAR:
        place = word | ((column & 4) << 3) | ((column & 1) << 4) | ((column & 2) >> 1)
    elif ORDER == FAR:
        place = word | ((column & 3) << 4) | ((column & 4) >> 2)
    else:
        place = column
    return place


@triton.jit
def arrange(x, to, H: tl.constexpr, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """Bring rows of x [*, H] into an order. Grid (rows, blocks)."""
    LENGTH: tl.constexpr = length_of(H, ORDER)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x + row * H + column, mask=column < H, other=0.0)
    tl.store(to + row * LENGTH + place_of(column, ORDER), values, mask=column < LENGTH)


@triton.jit
def columns_of(
    x, rows_M, mask_M, start, part: tl.constexpr, WIDTH: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A part of BLOCK_K columns from `start` on, of some rows of a matrix [*, WIDTH]."""
    LENGTH: tl.constexpr = length_of(WIDTH, ORDER)
    if ORDER == NATURAL:
        at_K = start + tl.arange(0, BLOCK_K)
    else:
        place_K = tl.arange(0, BLOCK_K // 4)
        at_K = start + place_K // 16 * 64 + part * 16 + place_K % 16
    return tile_of(x, rows_M, mask_M, at_K, LENGTH)
