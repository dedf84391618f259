"""Attention of single new tokens, each over its own row of a key/value cache and its own length.

One program a token and query head runs down the row once (online softmax, as in FlashAttention), so
that no row is gathered or masked, and what a token gets does not depend on who else is in the step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Positions at a time."""


@triton.jit(do_not_specialize=["CONTEXT"], do_not_specialize_on_alignment=["rows", "positions"])
def _attend(
    query, keys, values, out, rows, positions, sinks, scale, CONTEXT, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(positions + token) + 1
    first = (tl.load(rows + token) * (HEADS // GROUP) + head // GROUP) * CONTEXT
    at_D, at_V = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    at_query = (token * HEADS + head) * D
    query_D = tl.load(query + at_query + at_D, mask=at_D < D, other=0.0).to(tl.float32)
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mean_V = tl.zeros([BLOCK_V], tl.float32)
    start = tl.maximum(length - WINDOW, 0) if WINDOW else length * 0
    while start < length:
        at_C = start + tl.arange(0, BLOCK_C)
        is_seen_C = at_C < length
        mask_CD = is_seen_C[:, None] & (at_D < D)[None, :]
        mask_CV = is_seen_C[:, None] & (at_V < V)[None, :]
        key_CD = tl.load(
            keys + (first + at_C)[:, None] * D + at_D[None, :], mask=mask_CD, other=0.0
        )
        value_CV = tl.load(
            values + (first + at_C)[:, None] * V + at_V[None, :], mask=mask_CV, other=0.0
        )
        score_C = tl.sum(key_CD.to(tl.float32) * query_D[None, :], axis=1) * scale
        score_C = tl.where(is_seen_C, score_C, float("-inf"))
        higher = tl.maximum(best, tl.max(score_C, axis=0))
        share_C, faded = tl.exp(score_C - higher), tl.exp(best - higher)
        total = total * faded + tl.sum(share_C, axis=0)
        mean_V = mean_V * faded + tl.sum(share_C[:, None] * value_CV.to(tl.float32), axis=0)
        best = higher
        start += BLOCK_C
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(best, sink)
        faded = tl.exp(best - higher)
        total = total * faded + tl.exp(sink - higher)
        mean_V *= faded
    at_out = (token * HEADS + head) * V
    result_V = (mean_V / total).to(out.dtype.element_ty)
    tl.store(out + at_out + at_V, result_V, mask=at_V < V)


def attend(
    query_BHD: Tensor,
    keys_RGCD: Tensor,
    values_RGCV: Tensor,
    rows_B: Tensor,
    positions_B: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[B, H, V]: token b at `positions_B` of row `rows_B`, whose own key is in the cache already.

    R rows of G key/value heads and C positions; every H / G query heads share one. window: the
    newest keys that are seen. sinks_H: a logit of every head that takes part in the softmax only.
    """
    num_tokens, heads, width = query_BHD.shape
    groups, context, value_width = values_RGCV.shape[1:]
    assert keys_RGCD.is_contiguous()
    assert values_RGCV.is_contiguous()
    out_BHV = torch.empty(
        num_tokens, heads, value_width, dtype=query_BHD.dtype, device=query_BHD.device
    )
    query_BHD = query_BHD.contiguous()
    _attend[(num_tokens, heads)](
        query_BHD, keys_RGCD, values_RGCV, out_BHV, rows_B, positions_B,
        query_BHD if sinks_H is None else sinks_H, scale, context, HEADS=heads,
        GROUP=heads // groups, D=width, V=value_width, WINDOW=window or 0,
        HAS_SINKS=sinks_H is not None, BLOCK_C=BLOCK, BLOCK_D=triton.next_power_of_2(width),
        BLOCK_V=triton.next_power_of_2(value_width), num_warps=4,
    )  # fmt: skip
    return out_BHV
