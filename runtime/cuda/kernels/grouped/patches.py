"""Patches of packed matrices in products of many tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.grouped.columns import length_of, place_of
from runtime.cuda.kernels.packed import first_half, num_entries, patches_in

ENTRIES, TAKEN = tl.constexpr(128), tl.constexpr(16)
"""Entries that are searched at a time, and patches that are added: few entries hold one."""


@triton.jit
def add_patches(
    sums_MN, x, row_M, mask_M, block, row, rows_N, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    MATRICES: tl.constexpr, CHUNK: tl.constexpr, PATCHES: tl.constexpr, SPAN: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """Add the patches' share of the products of some rows of x with SPAN rows of a matrix from
    `row` on, those of rows_N, to sums [M, N].
    """
    first = (FIRST + row * WIDTH) // CHUNK * PATCHES
    entries = patches_in(block, MATRICES) + first
    for start in range(0, num_entries(SPAN, WIDTH, CHUNK, PATCHES), ENTRIES):
        entry_P = start + tl.arange(0, ENTRIES)
        mask_P = first + entry_P < MATRICES // CHUNK * PATCHES
        is_one_P = (entry_P % PATCHES != 0) & (tl.load(entries + entry_P, mask_P, other=0) != 0)
        upto_P = tl.cumsum(is_one_P.to(tl.int32), axis=0)
        count = tl.max(upto_P, axis=0)
        taken = count * 0
        while taken < count:
            nth_Q = taken + tl.arange(0, TAKEN)
            before_Q = tl.sum((upto_P[:, None] <= nth_Q[None, :]).to(tl.int32), axis=0)
            sums_MN = add_some(
                sums_MN, x, row_M, mask_M, entries, first, start + before_Q, nth_Q < count,
                rows_N, FIRST, WIDTH, CHUNK, PATCHES, ORDER,
            )  # fmt: skip
            taken += TAKEN
    return sums_MN


@triton.jit
def add_some(
    sums_MN, x, row_M, mask_M, entries, first, at_Q, is_one_Q, rows_N, FIRST: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PATCHES: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """The same for the patches in some entries."""
    patch_Q = tl.load(entries + at_Q, mask=is_one_Q, other=0)
    unit_Q = (first + at_Q) // PATCHES * CHUNK + (patch_Q >> 16) - FIRST
    row_Q = tl.where(is_one_Q, unit_Q // WIDTH, -1)
    place_Q = place_of(unit_Q - unit_Q // WIDTH * WIDTH, ORDER)
    at_MQ = row_M[:, None] * length_of(WIDTH, ORDER) + place_Q[None, :]
    x_MQ = tl.load(x + at_MQ, mask=mask_M[:, None] & is_one_Q[None, :], other=0.0)
    weight_Q = first_half(patch_Q)
    weight_QN = tl.where(row_Q[:, None] == rows_N[None, :], weight_Q[:, None], 0.0)
    return tl.dot(x_MQ, weight_QN, sums_MN)
