"""Number formats of 4 and 8 bits that torch does not compute with."""

from __future__ import annotations

from functools import cache

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
    return _look_up(_e2m1_pairs(dtype, factor, codes.device), codes.int())


def unpack_int4(codes: Tensor, dtype: torch.dtype, zero: int) -> Tensor:
    """The numbers [.., K] of packed codes [.., K / 2], less `zero`."""
    return _look_up(_int4_pairs(dtype, zero, codes.device), codes.int())


def unpack_e4m3(codes: Tensor) -> Tensor:
    """The float32 numbers of codes of 8 bits; on the CPU faster than torch's own conversion."""
    in_pairs = codes.shape[-1] % 2 == 0 and codes.storage_offset() % 2 == 0
    if codes.device.type != "cpu" or not in_pairs or not codes.is_contiguous():
        return codes.float()
    return _look_up(_e4m3_pairs(), codes.view(torch.int16).int() & 0xFFFF)


@cache
def _e2m1_pairs(dtype: torch.dtype, factor: float, device: torch.device) -> Tensor:
    """The two numbers of every byte."""
    return torch.tensor(E2M1_PAIRS, dtype=torch.float32, device=device).mul_(factor).to(dtype)


@cache
def _int4_pairs(dtype: torch.dtype, zero: int, device: torch.device) -> Tensor:
    """The two numbers of every byte."""
    pairs = [((byte & 15) - zero, (byte >> 4) - zero) for byte in range(256)]
    return torch.tensor(pairs, dtype=dtype, device=device)


@cache
def _e4m3_pairs() -> Tensor:
    """The two numbers of every two bytes."""
    codes = torch.arange(1 << 16, device="cpu").to(torch.uint16).view(torch.float8_e4m3fn)
    return codes.view(-1, 2).float()


def _look_up(pairs: Tensor, indices: Tensor) -> Tensor:
    """The pairs of each row of indices, side by side; each is copied as one number."""
    wide = torch.int64 if pairs.dtype.itemsize == 4 else torch.int32
    found = pairs.view(wide).flatten().index_select(0, indices.flatten())
    return found.view(indices.shape).view(pairs.dtype)


def power_of_two(exponents: Tensor) -> Tensor:
    """2 ^ exponent in float32, subnormal numbers too; infinite from 128.

    exponents: int32 from -149.
    """
    normal = (exponents.clamp(-127, 128) + 127) << 23
    subnormal = torch.ones_like(exponents) << (exponents.clamp(-149, -127) + 149)
    return torch.where(exponents < -126, subnormal, normal).view(torch.float32)
