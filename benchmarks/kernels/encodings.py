"""Encodings of the benchmarked experts, and random parts of their matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4

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
