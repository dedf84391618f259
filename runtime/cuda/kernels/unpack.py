"""Unpacking and decoding expert blocks: for many tokens, whose products want whole matrices, and
for giving a model back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.cuda.kernels.coded import Code
from runtime.cuda.kernels.coded.decoding import FP8, weights_of
from runtime.cuda.kernels.coded.tiles import group_of, scales_of, words_of
from runtime.cuda.kernels.packed import base_at, packed_at, patches_in, side_by_side, words
from runtime.cuda.kernels.unpacked import record_elements


@triton.jit
def based(word, base):
    """A word as the checkpoint has it: the base added where there is a code."""
    some = (((word & 0x07800780) + 0x07800780) >> 11) & 0x00010001
    return word + some * (base << 7)


@triton.jit
def in_turn(even, odd):
    """Words of the weights (0, 2) and (1, 3) as the words (0, 1) and (2, 3), in an int64."""
    first = (even & 0xFFFF) | (odd << 16)
    second = ((even >> 16) & 0xFFFF) | (odd & -65536)
    return (first.to(tl.int64) & 0xFFFFFFFF) | (second.to(tl.int64) << 32)


@triton.jit(do_not_specialize_on_alignment=["picked"])
def unpack(
    to, slots, picked, UNITS: tl.constexpr, STORED: tl.constexpr, MATRICES: tl.constexpr,
    CHUNK: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Unpack the blocks in slots `picked` (int32) to rows 0, 1, ... of `to`, int16 [*, UNITS].

    Grid (chunks, blocks); chunks behind the matrices are copied.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    block = slots + tl.load(picked + row).to(tl.int64) * STORED
    into = to + row.to(tl.int64) * UNITS + chunk * CHUNK
    if chunk * CHUNK < MATRICES:
        eight = tl.arange(0, CHUNK // 8)
        base = base_at(block, chunk * CHUNK, MATRICES, CHUNK, PATCHES)
        low, codes = packed_at(block, chunk * (CHUNK // 8) + eight, eight >= 0, MATRICES)
        first = in_turn(based(words(low, codes, 0), base), based(words(low, codes, 1), base))
        second = in_turn(based(words(low, codes, 2), base), based(words(low, codes, 3), base))
        four = tl.reshape(tl.join(first, second), (CHUNK // 4,))
        to_four = into.to(tl.pointer_type(tl.int64), bitcast=True) + tl.arange(0, CHUNK // 4)
        tl.store(to_four, four)
        tl.debug_barrier()  # patches overwrite what other threads just stored
        entry = tl.arange(0, PATCHES)
        patch = tl.load(patches_in(block, MATRICES) + chunk * PATCHES + entry)
        is_patch = (entry > 0) & (patch != 0)
        tl.store(into + (patch >> 16), patch.to(tl.int16), mask=is_patch)
    else:
        behind: tl.constexpr = MATRICES * 3 // 4 + MATRICES // CHUNK * PATCHES * 2
        at = (chunk - MATRICES // CHUNK) * CHUNK + tl.arange(0, CHUNK)
        tl.store(
            into + tl.arange(0, CHUNK),
            tl.load(block + behind + at, mask=at < STORED - behind),
        )


@triton.jit
def weights_in_turn(words, scale, zero, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of words [N, G, J]: [N, G, J, 2, 2, 2] in float32, exact whatever their scale."""
    w_0, w_4 = weights_of(words, 0, scale, zero, CODE.kind, CODE.product, DTYPE, True)
    w_1, w_5 = weights_of(words, 1, scale, zero, CODE.kind, CODE.product, DTYPE, True)
    w_2, w_6 = weights_of(words, 2, scale, zero, CODE.kind, CODE.product, DTYPE, True)
    w_3, w_7 = weights_of(words, 3, scale, zero, CODE.kind, CODE.product, DTYPE, True)
    if CODE.kind == FP8:  # whose pairs are (0, 2), (1, 3), (4, 6), (5, 7)
        w_2, w_3, w_4, w_5, w_6, w_7 = w_4, w_5, w_2, w_3, w_6, w_7
    return side_by_side(w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)


@triton.jit(do_not_specialize_on_alignment=["picked"])
def decode(
    to, slots, picked, UNITS: tl.constexpr, STORED: tl.constexpr, START: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, CODE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Decode a matrix [N, K] of the blocks in slots `picked` (int32), int16 [*, STORED] each.

    to: rows of UNITS int16 in the weights' type, with the matrix from element START on.
    Grid (tiles, blocks).
    """
    J: tl.constexpr = group_of(CODE.kind, CODE.columns, K)
    G: tl.constexpr = BLOCK_K // (8 * J)
    DTYPE: tl.constexpr = to.dtype.element_ty
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile, row = tl.program_id(0), tl.program_id(1)
    block = slots + tl.load(picked + row).to(tl.int64) * STORED
    rows_N = tile // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_N = rows_N < N
    start = tile % TILES * BLOCK_K
    group_G = start // (8 * J) + tl.arange(0, G)
    words = words_of(block, rows_N, mask_N, group_G, K, CODE, J)
    scale, zero = scales_of(block, rows_N, mask_N, group_G, K, CODE, J)
    weights = weights_in_turn(words, scale, zero, CODE, DTYPE)
    column_K = start + tl.arange(0, BLOCK_K)
    into = to + row.to(tl.int64) * record_elements(to, UNITS) + START
    mask_NK = mask_N[:, None] & (column_K < K)[None, :]
    at_NK = rows_N[:, None] * K + column_K[None, :]
    tl.store(into + at_NK, tl.reshape(weights, (BLOCK_N, BLOCK_K)).to(DTYPE), mask=mask_NK)


@triton.jit(do_not_specialize_on_alignment=["picked"])
def copy_behind(
    to, slots, picked, UNITS: tl.constexpr, STORED: tl.constexpr, TO: tl.constexpr,
    SOURCE: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy LENGTH int16 from SOURCE in the blocks in slots `picked` to TO in rows of `to`.

    Grid (cdiv(LENGTH, BLOCK), blocks).
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    block = slots + tl.load(picked + row).to(tl.int64) * STORED
    units = tl.load(block + SOURCE + at, mask=at < LENGTH)
    tl.store(to + row.to(tl.int64) * UNITS + TO + at, units, mask=at < LENGTH)


TILE = 8, 512
"""Rows and columns that a program of `decode` decodes."""


def decode_matrix(
    code: Code, shape: tuple[int, int], dtype: torch.dtype, slots_SN: Tensor, picked: Tensor,
    to_RN: Tensor, start: int,
) -> None:  # fmt: skip
    """Decode a matrix of the stored blocks in slots `picked`, int32 [R], to elements of `dtype`
    from `start` on in int16 rows, on the current stream.
    """
    rows, columns = TILE
    tiles = triton.cdiv(shape[0], rows) * triton.cdiv(shape[1], columns)
    decode[(tiles, len(picked))](
        to_RN.view(dtype), slots_SN, picked, UNITS=to_RN.shape[1], STORED=slots_SN.shape[1],
        START=start, N=shape[0], K=shape[1], CODE=code, BLOCK_N=rows, BLOCK_K=columns, num_warps=4,
    )  # fmt: skip


def copy_units(
    source: int, to: int, length: int, slots_SN: Tensor, picked: Tensor, to_RN: Tensor
) -> None:
    """Copy some units of the stored blocks in slots `picked`, such as biases, to rows of others."""
    copy_behind[(triton.cdiv(length, 1024), len(picked))](
        to_RN, slots_SN, picked, UNITS=to_RN.shape[1], STORED=slots_SN.shape[1], TO=to,
        SOURCE=source, LENGTH=length, BLOCK=1024,
    )  # fmt: skip
