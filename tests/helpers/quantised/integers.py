"""Rounding of weights to whole numbers of 4 bits, and their packing in words of 32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.helpers.quantised.coding import blocks_of, spread

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each 4 bits of a word are, from the lowest."""


class Int4(NamedTuple):
    """Whole numbers of 4 bits with their scales and zeros, one value each."""

    codes: Tensor
    """uint8 [N, K], 0..15."""
    scales: Tensor
    """[N, groups]."""
    zeros: Tensor
    """uint8 [N, groups]."""


def round_to_int4(
    weights: Tensor, columns: int, dtype: torch.dtype, *, symmetric: bool, least: int = 0
) -> Int4:
    """The nearest numbers. least: zero that a format can store."""
    columns = min(columns, weights.shape[-1])
    numbers = weights.float().unflatten(-1, (-1, columns))
    if symmetric:
        scales = (blocks_of(weights, (1, columns)) / 7.5).clamp(min=1e-6).to(dtype)
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    else:
        low, high = numbers.amin(-1).clamp(max=0), numbers.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).clamp(min=1e-6).to(dtype)
        zeros = (-low / scales.float()).round().clamp(least, 15).to(torch.uint8)
    each = spread(scales.float(), (1, columns), weights.shape)
    shift = spread(zeros.float(), (1, columns), weights.shape)
    codes = (weights.float() / each + shift).round().clamp(0, 15).to(torch.uint8)
    return Int4(codes, scales, zeros)


def pack_rows(numbers: Tensor) -> Tensor:
    """int32 words [.., ceil(n / 8)] of numbers [.., n], the first in the lowest bits."""
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % 8))
    return _words(padded, range(8))


def pack_awq(numbers: Tensor) -> Tensor:
    """int32 words [.., n / 8] of numbers [.., n], in the order of AWQ."""
    return _words(numbers, AWQ_ORDER)


def _words(numbers: Tensor, order: range | tuple[int, ...]) -> Tensor:
    in_words = numbers.long().unflatten(-1, (-1, 8))
    words = sum(in_words[..., column] << 4 * place for place, column in enumerate(order))
    return torch.as_tensor(words).to(torch.int32)
