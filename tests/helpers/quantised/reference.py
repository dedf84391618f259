"""Numbers from codes, one by one by the definitions of their formats (OCP MX 1.0, OCP FP8 1.0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.weights.encodings.encoding import Encoding

FP32 = torch.float32


def e2m1(code: int) -> float:
    """A sign, two bits of exponent with bias 1, one of mantissa."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def e4m3(code: int) -> float:
    """A sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    sign = -1.0 if code & 128 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return sign * size


def e8m0(code: int) -> float:
    """A power of two with bias 127."""
    return 2.0 ** (code - 127)


E2M1 = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)
E4M3 = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
E8M0 = torch.tensor([e8m0(code) for code in range(256)], dtype=torch.float64)


def numbers(codes: Tensor) -> Tensor:
    """float64 numbers of codes: of e4m3, of packed e2m1 (any other bytes), or of a float format."""
    if codes.dtype == torch.float8_e4m3fn:
        return E4M3[codes.view(torch.uint8).long()]
    if codes.dtype.is_floating_point and codes.dtype.itemsize > 1:
        return codes.double()
    stored = codes.view(torch.uint8).long()
    return torch.stack([E2M1[stored & 15], E2M1[stored >> 4]], -1).flatten(-2)


def scales(stored: Tensor) -> Tensor:
    """float64 numbers of scales: bytes are e8m0."""
    if stored.dtype.itemsize == 1 and stored.dtype != torch.float8_e4m3fn:
        return E8M0[stored.view(torch.uint8).long()]
    return numbers(stored)


def decode(codes: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weights [.., N, K] of codes, of which `block` rows and columns share a scale."""
    values = numbers(codes)
    rows = torch.arange(values.shape[-2]) // block[0]
    columns = torch.arange(values.shape[-1]) // block[1]
    products = values * scales(scale)[..., rows, :][..., columns]
    return products.float().to(dtype)


def decode_integers(codes: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """The weights of whole numbers [N, K], of which some neighbours share a scale and a zero.

    They are in the number format of the scales.
    """
    columns = torch.arange(codes.shape[-1]) // (codes.shape[-1] // scale.shape[-1])
    products = (codes.double() - zeros.double()[..., columns]) * scale.double()[..., columns]
    return products.to(scale.dtype)


def decode_nvfp4(
    codes: Tensor, scale: Tensor, global_scale: Tensor, *, divides: bool = False
) -> Tensor:
    """The float32 weights [.., N, K] of packed codes. global_scale: for each scale, or for all."""
    one = global_scale.double()
    both = scales(scale) / one if divides else scales(scale) * one
    columns = torch.arange(codes.shape[-1] * 2) // 16
    return (numbers(codes) * both.float().double()[..., columns]).float()


def decode_parts(encoding: Encoding, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weights of a matrix in any encoding, by the definition of the encoding."""
    return DECODERS[encoding.name](encoding, parts, dtype)


def _of_blocks(encoding: Any, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    weights = decode(parts["codes"], parts["scales"], (encoding.rows, encoding.columns), FP32)
    return weights.to(getattr(encoding, "product", FP32)).to(dtype)


def _of_integers(encoding: Any, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    codes, scale = parts["codes"], parts["scales"]
    unpacked = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    zeros = parts["zeros"] if encoding.zeros else torch.full(scale.shape, 8)
    return decode_integers(unpacked, scale, zeros).to(dtype)


def _of_nvfp4(encoding: Any, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    rows = torch.arange(len(parts["codes"])) // encoding.rows
    ones = parts["global_scales"][rows][:, None]
    return decode_nvfp4(parts["codes"], parts["scales"], ones, divides=encoding.divides).to(dtype)


DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor], torch.dtype], Tensor]] = {
    "mxfp4": _of_blocks,
    "fp8-block": _of_blocks,
    "int4-group": _of_integers,
    "nvfp4": _of_nvfp4,
}
"""By the name of the encoding."""
