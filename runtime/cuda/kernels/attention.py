"""Attention of single new tokens, each over its own row of a key/value cache and its own length.

    attend_blocks   the softmax over one block of keys, for one token and the heads of one key head
    join_blocks     the softmax over all blocks of one token and head

Blocks start at multiples of a length that the width of a head decides, so that a long row keeps the
whole GPU busy (as flash decoding does), and are joined in ascending order, `JOINED` at a time: the
order of every sum follows from the token's position alone, whoever else is in the step, however
many programs run, and whether a row lies in one piece or in pages of a few blocks, on the device or
in host memory. Pages there are read in place: each crosses the link once for every program that
takes it, which is one where a key head's query heads are together (`Tile`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.cuda.kernels.new_tokens import in_lines, piece_of
from runtime.kv.pages.places import Paged, Spilled

TILE = 8192
"""Keys of a block times the width of a head: 64 registers a thread for keys and values."""
SHORTEST, LONGEST = 16, 64
"""Keys of a block."""
JOINED = 32
"""Blocks that are joined at a time."""
PROGRAMS = 2048
"""About so many run at once at most: enough to fill a GPU several times over. With more blocks,
each program takes several."""


@triton.jit
def _scores(query_MD, key_CD, IS_ONE: tl.constexpr):
    """[M, C]; with one head in float32, with several by the tensor cores."""
    if IS_ONE:
        score_MC = tl.sum(key_CD.to(tl.float32) * query_MD.to(tl.float32), axis=1)[None, :]
    else:  # never compiled otherwise: the tensor cores take no head below 16
        score_MC = tl.dot(query_MD, tl.trans(key_CD))
    return score_MC


@triton.jit
def _mixed(share_MC, value_CV, IS_ONE: tl.constexpr):
    """[M, V], not normalised yet."""
    if IS_ONE:
        mixed_MV = tl.sum(tl.trans(share_MC) * value_CV.to(tl.float32), axis=0)[None, :]
    else:
        mixed_MV = tl.dot(share_MC.to(value_CV.dtype), value_CV)
    return mixed_MV


@triton.jit
def _at(states, spilled, piece, pages, states_R, SPILLS: tl.constexpr):
    """The page or row `piece`: of the device or, behind its `pages`, of host memory."""
    if SPILLS:
        states = tl.where(piece < pages, states, spilled)
        piece = tl.where(piece < pages, piece, piece - pages)
    return states + piece * states_R


@triton.jit(
    do_not_specialize=["N", "real_R", "table_R", "pages"],
    do_not_specialize_on_alignment=["rows", "positions", "real", "table"],
)
def attend_blocks(
    query, keys, values, far_keys, far_values, real, rows, positions, table, best, total, mixed,
    scale, softcap, N, query_T, query_H, keys_R, keys_G, keys_C, values_R, values_G, values_C,
    real_R, table_R, pages,
    HEADS: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, PAGE: tl.constexpr, SPILLS: tl.constexpr,
    WINDOW: tl.constexpr, HAS_REAL: tl.constexpr,
    IS_CAPPED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write, of each block n, the highest score to best [B, H, N] and, relative to it, the sums of
    the shares to total [B, H, N], of the values to mixed [B, H, N, V].

    EACH: query heads of a program; M: the same with padding. far_keys, far_values: SPILLS, those in
    host memory, whose pages are numbered behind the `pages` of the device.
    """
    token, tile = tl.program_id(0), tl.program_id(1)
    length, row = tl.load(positions + token) + 1, tl.load(rows + token)
    at_M, at_D, at_V = tl.arange(0, M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    head_M, is_head_M = tile * EACH + at_M, at_M < EACH
    group = tile * EACH // GROUP
    query_MD = tl.load(
        query + token * query_T + head_M[:, None] * query_H + at_D[None, :],
        mask=is_head_M[:, None] & (at_D < D)[None, :], other=0.0,
    )  # fmt: skip
    start = tl.maximum(length - WINDOW, 0) if WINDOW else length * 0
    block = start // BLOCK_C + tl.program_id(2)
    while block * BLOCK_C < length:
        at_C = block * BLOCK_C + tl.arange(0, BLOCK_C)
        is_seen_C = (at_C >= start) & (at_C < length)
        mask_CD = is_seen_C[:, None] & (at_D < D)[None, :]
        mask_CV = is_seen_C[:, None] & (at_V < V)[None, :]
        piece, first = piece_of(table, row, table_R, block * BLOCK_C, PAGE)
        from_C = (first + tl.arange(0, BLOCK_C))[:, None]
        from_keys = _at(keys, far_keys, piece, pages, keys_R, SPILLS) + group * keys_G
        from_values = _at(values, far_values, piece, pages, values_R, SPILLS) + group * values_G
        from_CD = from_keys + from_C * keys_C + at_D[None, :]
        from_CV = from_values + from_C * values_C + at_V[None, :]
        key_CD = tl.load(from_CD, mask=mask_CD, other=0.0)
        value_CV = tl.load(from_CV, mask=mask_CV, other=0.0)
        if HAS_REAL:
            is_seen_C &= tl.load(real + row * real_R + at_C, mask=is_seen_C, other=0) != 0
        score_MC = _scores(query_MD, key_CD, M == 1) * scale
        if IS_CAPPED:  # by the hyperbolic tangent
            score_MC = softcap * (2 * tl.sigmoid(2 * score_MC / softcap) - 1)
        score_MC = tl.where(is_seen_C[None, :], score_MC, float("-inf"))
        best_M = tl.max(score_MC, axis=1)
        base_M = tl.where(best_M == float("-inf"), 0.0, best_M)  # where all of it is padding
        share_MC = tl.exp(score_MC - base_M[:, None])
        mixed_MV = _mixed(share_MC, value_CV, M == 1)
        to_M = (token * HEADS + head_M) * N + block
        tl.store(best + to_M, best_M, mask=is_head_M)
        tl.store(total + to_M, tl.sum(share_MC, axis=1), mask=is_head_M)
        tl.store(
            mixed + to_M[:, None] * V + at_V[None, :], mixed_MV,
            mask=is_head_M[:, None] & (at_V < V)[None, :],
        )  # fmt: skip
        block += tl.num_programs(2)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["positions"])
def join_blocks(
    best, total, mixed, out, positions, sinks, N,
    HEADS: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write to out [B, H, V] the values, each with its share of the whole row."""
    token, head = tl.program_id(0), tl.program_id(1)
    length, at_V = tl.load(positions + token) + 1, tl.arange(0, BLOCK_V)
    row = token * HEADS + head
    highest = tl.full([], float("-inf"), tl.float32)
    sum_all = tl.full([], 0.0, tl.float32)
    mean_V = tl.zeros([BLOCK_V], tl.float32)
    block = tl.maximum(length - WINDOW, 0) // BLOCK_C if WINDOW else length * 0
    while block * BLOCK_C < length:
        at_J = block + tl.arange(0, BLOCK_J)
        is_used_J = at_J * BLOCK_C < length
        from_J = row * N + at_J
        best_J = tl.load(best + from_J, mask=is_used_J, other=float("-inf"))
        total_J = tl.load(total + from_J, mask=is_used_J, other=0.0)
        mixed_JV = tl.load(
            mixed + from_J[:, None] * V + at_V[None, :],
            mask=is_used_J[:, None] & (at_V < V)[None, :], other=0.0,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(best_J, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight_J, faded = tl.exp(best_J - base), tl.exp(highest - base)
        sum_all = sum_all * faded + tl.sum(total_J * weight_J, axis=0)
        mean_V = mean_V * faded + tl.sum(mixed_JV * weight_J[:, None], axis=0)
        highest = higher
        block += BLOCK_J
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(highest, sink)
        faded = tl.exp(highest - higher)
        sum_all = sum_all * faded + tl.exp(sink - higher)
        mean_V *= faded
    result_V = (mean_V / sum_all).to(out.dtype.element_ty)
    tl.store(out + row * V + at_V, result_V, mask=at_V < V)


class Tile(NamedTuple):
    """What a program of `attend_blocks` takes at a time."""

    keys: int
    heads: int
    """Query heads."""
    rows: int
    """The same, padded to what the tensor cores take."""
    warps: int = 4
    """Two are a sixth faster for one head on an H200 (docs/results)."""

    @classmethod
    def of(cls, group: int, width: int, dtype: torch.dtype) -> Tile:
        """group: query heads of a key head; width: of a head, the wider one of keys and values."""
        keys = min(max(TILE // triton.next_power_of_2(width), SHORTEST), LONGEST)
        is_wide = dtype == torch.float32  # no tensor core has float32's precision
        heads = 1 if is_wide else group
        if heads == 1:
            return cls(keys, 1, 1, warps=4 if is_wide else 2)
        return cls(keys, heads, max(16, triton.next_power_of_2(heads)))


def attend(
    query_BHD: Tensor,
    keys_RGCD: Tensor,
    values_RGCV: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
    softcap: float | None = None,
    real_RC: Tensor | None = None,
    paged: Paged | None = None,
    spilled: Spilled | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """[B, H, V]: token b at `positions_B` of row `rows_B`, whose own key is in the cache already.

    R rows of G key/value heads and C positions; every H / G query heads share one. window: the
    newest keys that are seen. sinks_H: a logit of every head that takes part in the softmax only.
    softcap: a bound that scores approach. real_RC: bool, False for keys that nobody sees. tile: of
    another size than usual. paged: where keys and values lie in pages, and R and C count these and
    their positions. spilled: further pages, in pinned host memory.
    """
    query_BHD, keys_RGCD, values_RGCV = map(in_lines, (query_BHD, keys_RGCD, values_RGCV))
    num_tokens, heads, width = query_BHD.shape
    groups, context, value_width = values_RGCV.shape[1:]
    group = heads // groups
    tile = tile or Tile.of(group, max(width, value_width), query_BHD.dtype)
    table, page = (rows_B, 0) if paged is None else (paged.table_RN, paged.page)
    if paged is not None:
        context = paged.context
        assert not page % tile.keys, "a block of keys lies in one page"
    far_keys, far_values = spilled or (keys_RGCD, values_RGCV)
    assert far_keys.stride() == keys_RGCD.stride() and far_values.stride() == values_RGCV.stride()
    num_blocks = triton.cdiv(context, tile.keys)
    num_tiles = heads // tile.heads
    programs = min(num_blocks, triton.cdiv(PROGRAMS, num_tokens * num_tiles))
    new = query_BHD.new_empty
    best, total = new(2, num_tokens, heads, num_blocks, dtype=torch.float32)
    mixed = new(num_tokens, heads, num_blocks, value_width, dtype=torch.float32)
    out_BHV = new(num_tokens, heads, value_width)
    shape = {"HEADS": heads, "V": value_width, "WINDOW": window or 0, "BLOCK_C": tile.keys}
    least = 1 if tile.rows == 1 else 16
    real = positions_B if real_RC is None else real_RC.view(torch.uint8)
    attend_blocks[(num_tokens, num_tiles, programs)](
        query_BHD, keys_RGCD, values_RGCV, far_keys, far_values, real, rows_B, positions_B, table,
        best, total, mixed, scale, softcap or 0.0, num_blocks, *query_BHD.stride()[:2],
        *keys_RGCD.stride()[:3], *values_RGCV.stride()[:3], real.stride(0), table.stride(0),
        len(keys_RGCD), GROUP=group, EACH=tile.heads, M=tile.rows, D=width, PAGE=page,
        SPILLS=spilled is not None, HAS_REAL=real_RC is not None, IS_CAPPED=softcap is not None,
        BLOCK_D=max(triton.next_power_of_2(width), least),
        BLOCK_V=max(triton.next_power_of_2(value_width), least), **shape,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    join_blocks[(num_tokens, heads)](
        best, total, mixed, out_BHV, positions_B, query_BHD if sinks_H is None else sinks_H,
        num_blocks, HAS_SINKS=sinks_H is not None, BLOCK_J=JOINED,
        BLOCK_V=triton.next_power_of_2(value_width), **shape, num_warps=4,
    )  # fmt: skip
    return out_BHV
