"""Rounding of weights to the numbers of a format, and their packing as checkpoints have them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.quantised import reference

LARGEST_E4M3 = 448.0


def blocks_of(weights: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest size of a number in each block, [.., rows, columns]; the last may be smaller."""
    rows, columns = weights.shape[-2:]
    missing = (-columns % block[1], -rows % block[0])
    padded = torch.nn.functional.pad(weights.float().abs(), (0, missing[0], 0, missing[1]))
    split = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    return split.amax((-3, -1))


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each weight."""
    every = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return every[..., : shape[-2], : shape[-1]]


def to_e4m3(
    weights: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Codes [.., N, K] and scales [.., ceil(N / rows), ceil(K / columns)] of `dtype`."""
    largest = blocks_of(weights, block).clamp(min=1e-12) / LARGEST_E4M3
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = largest.log2().ceil().clamp(-127, 127)
        scales, numbers = (exponents + 127).to(torch.uint8).view(dtype), exponents.exp2()
    else:
        scales = largest.to(dtype)
        numbers = scales.float()
    codes = weights.float() / spread(numbers, block, weights.shape)
    return codes.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn), scales


def to_mxfp4(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [.., N, K / 2] and scales [.., N, K / 32], both uint8."""
    largest = blocks_of(weights, (1, 32)).clamp(min=2.0**-120)
    exponents = (largest.log2().floor() - 2).clamp(-127, 127)
    numbers = weights.float() / spread(exponents.exp2(), (1, 32), weights.shape)
    return pack(nearest_e2m1(numbers)), (exponents + 127).to(torch.uint8)


def nearest_e2m1(numbers: Tensor) -> Tensor:
    """The codes of 4 bits nearest to some numbers."""
    sizes = reference.E2M1[:8].float()
    middles = (sizes[1:] + sizes[:-1]) / 2
    codes = torch.bucketize(numbers.abs().contiguous(), middles)
    return (codes | torch.signbit(numbers).long() << 3).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte, the first in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4
