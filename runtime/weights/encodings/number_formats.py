"""Number formats of 4 and 8 bits that torch does not compute with."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of 4 bits, by code."""
E2M1_PAIRS = tuple((E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256))
"""The two numbers of a byte, the low half first."""
E8M0_BIAS = 127
E8M0_NAN = 255


def unpack_e2m1(codes: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """The numbers [.., K] of packed codes [.., K / 2], times a power of two, exactly."""
    pairs = torch.tensor(E2M1_PAIRS, device=codes.device).mul_(factor).to(dtype)
    return torch.nn.functional.embedding(codes.int(), pairs).flatten(-2)


def power_of_two(exponents: Tensor) -> Tensor:
    """2 ^ exponent in float32, subnormal numbers too; infinite from 128.

    exponents: int32 from -149.
    """
    normal = (exponents.clamp(-127, 128) + 127) << 23
    subnormal = torch.ones_like(exponents) << (exponents.clamp(-149, -127) + 149)
    return torch.where(exponents < -126, subnormal, normal).view(torch.float32)


def multiply_blocks(weights_NK: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """Multiply blocks of `rows` x `columns` by a scale each, in place; the last may be narrower."""
    scales = scales if rows == 1 else scales.repeat_interleave(rows, 0)
    full = weights_NK.shape[1] // columns
    whole = weights_NK[:, : full * columns]
    whole.unflatten(1, (full, columns)).mul_(scales[:, :full, None])
    weights_NK[:, full * columns :].mul_(scales[:, full:])
    return weights_NK
