"""Root-mean-square normalisation in one kernel: a model's own modules take eight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _normalise(
    x, weight, y, eps, WIDTH: tl.constexpr, LATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    x_H = tl.load(x + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    weight_H = tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    y_H = x_H * tl.rsqrt(tl.sum(x_H * x_H, axis=0) / WIDTH + eps)
    if not LATE:
        y_H = y_H.to(y.dtype.element_ty).to(tl.float32)
    y_H = (y_H * weight_H).to(y.dtype.element_ty)
    tl.store(y + row * WIDTH + at, y_H, mask=at < WIDTH)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, *, late: bool = False) -> Tensor:
    """Normalise x [..., H], contiguous, in float32; late: rounded after the weight only."""
    assert x.is_contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    _normalise[(x.numel() // width,)](
        x, weight_H, y, eps, WIDTH=width, LATE=late, BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )  # fmt: skip
    return y
