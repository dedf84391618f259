"""The highest of a few numbers in one kernel: torch's own sorts in several.

It runs for routers: rows of up to `MOST` numbers, of which up to `MOST_CHOSEN` are chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST, MOST_CHOSEN = 1024, 16
TYPES = torch.float32, torch.bfloat16, torch.float16
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _choose(
    x, values, indices, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, index_N = tl.program_id(0), tl.arange(0, BLOCK)
    x_N = tl.load(x + row * N + index_N, mask=index_N < N, other=0.0).to(tl.float32)
    bits_N = (x_N + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    order_N = tl.where(bits_N < 0, bits_N ^ 0x7FFFFFFF, bits_N)
    order_N = tl.where(x_N != x_N, 0x7FFFFFFF, order_N)
    order_N = tl.where(index_N < N, order_N, LOWEST)
    for k in tl.static_range(K):
        best = tl.argmax(order_N, axis=0)
        tl.store(indices + row * K + k, best.to(tl.int64))
        value = tl.sum(tl.where(index_N == best, x_N, 0.0), axis=0)
        tl.store(values + row * K + k, value.to(values.dtype.element_ty))
        order_N = tl.where(index_N == best, LOWEST, order_N)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest along the last dimension of x [..., N], in descending order, and their indices,
    int64. Of equals the lower index comes first; NaN counts as the highest.
    """
    x = x.contiguous()
    shape = *x.shape[:-1], k
    values, indices = x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)
    block = triton.next_power_of_2(x.shape[-1])
    _choose[(values.numel() // k,)](
        x, values, indices, N=x.shape[-1], K=k, BLOCK=block, num_warps=1 if block <= 256 else 4
    )
    return values, indices


def takes(x: Tensor, k: int, dim: int, *, largest: bool) -> bool:
    """Whether `top_k` can stand for `torch.topk` with these arguments."""
    return (
        largest
        and x.dtype in TYPES
        and x.dim() > 0
        and dim in (-1, x.dim() - 1)
        and 0 < k <= min(x.shape[-1], MOST_CHOSEN)
        and x.shape[-1] <= MOST
        and x.numel() > 0
    )
