"""Encodings of the benchmarked experts, and random parts of their matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.number_formats import multiply_blocks, unpack_e2m1


@dataclass(frozen=True, kw_only=True)
class Int4Group(Encoding):
    name: ClassVar[str] = "int4-group"
    zeros: bool = False
    scale: torch.dtype = torch.bfloat16
    bits = 4

    def parts(self, shape: tuple[int, int]) -> Specs:
        rows, columns = shape
        groups = rows, columns // self.columns
        parts = {CODES: Spec((rows, columns // 2), torch.uint8), SCALES: Spec(groups, self.scale)}
        return parts | ({"zeros": Spec(groups, torch.uint8)} if self.zeros else {})

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = parts[CODES]
        values = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
        grouped = values.unflatten(1, (-1, self.columns))
        zeros = parts["zeros"].float()[..., None] if self.zeros else 8.0
        weights = (grouped - zeros) * parts[SCALES].float()[..., None]
        return weights.flatten(1).to(self.scale).to(dtype)


@dataclass(frozen=True, kw_only=True)
class NVFP4(Encoding):
    name: ClassVar[str] = "nvfp4"
    columns: int = 16
    divides: bool = False
    bits = 4

    def parts(self, shape: tuple[int, int]) -> Specs:
        rows, columns = shape
        return {
            CODES: Spec((rows, columns // 2), torch.uint8),
            SCALES: Spec((rows, columns // 16), torch.float8_e4m3fn),
            "global_scales": Spec((rows // self.rows,), torch.float32),
        }

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        whole = parts["global_scales"].repeat_interleave(self.rows)[:, None]
        scales = parts[SCALES].float()
        scales = scales / whole if self.divides else scales * whole
        return multiply_blocks(unpack_e2m1(parts[CODES], torch.float32), scales, 1, 16).to(dtype)


ENCODINGS: dict[str, Callable[[int, int], Encoding]] = {
    "mxfp4": lambda _rows, _columns: MXFP4(),
    "fp8": lambda rows, _columns: FP8Block(rows=math.gcd(rows, 128), columns=128),
    "fp8-row": lambda _rows, columns: FP8Block(columns=columns),
    "int4-128": lambda _rows, columns: Int4Group(columns=math.gcd(columns, 128)),
    "int4-32-zeros": lambda _rows, _columns: Int4Group(columns=32, zeros=True),
    "nvfp4": lambda rows, _columns: NVFP4(rows=rows),
}
"""By name; of a matrix [N, K], of which gate and up are two."""


def fill(parts: Mapping[str, Tensor]) -> None:
    """Draw the parts of some matrices, so that weights are about 0.02."""
    for name, part in parts.items():
        if name == CODES:
            part.view(torch.uint8).random_(0, 256)
            if part.dtype == torch.float8_e4m3fn:
                part.copy_((torch.randn(part.shape, device=part.device) * 60).clamp(-448, 448))
        elif part.dtype == torch.uint8:
            part.random_(*((118, 122) if name == SCALES else (4, 12)))
        elif part.dtype == torch.float8_e4m3fn:
            part.copy_(torch.rand(part.shape, device=part.device) * 40 + 1)
        else:
            part.copy_(torch.rand(part.shape, device=part.device) * 4e-4 + 1e-4)
