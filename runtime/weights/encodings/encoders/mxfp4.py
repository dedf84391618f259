"""The encoder of mxfp4: e2m1 times a power of 2 per 32 weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.weights.encodings.encoders.e2m1 import e2m1_codes, round_to_e2m1
from runtime.weights.encodings.encoders.grid import Encoder, Grid, pack_nibbles
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.mxfp4 import MXFP4

BIAS = 127
LARGEST_EXPONENT = 2
"""Of the numbers of e2m1."""


@dataclass(frozen=True, kw_only=True)
class MXFP4Grid(Grid):
    """e2m1 under powers of 2: that of the OCP specification, and those beside it."""

    def round(self, ratios: Tensor) -> Tensor:
        return round_to_e2m1(ratios)

    def scales(self, largest_NB: Tensor) -> list[Tensor]:
        exponents_NB = torch.frexp(largest_NB).exponent - 1 - LARGEST_EXPONENT
        ones_NB = torch.ones_like(largest_NB)
        return [
            torch.ldexp(ones_NB, (exponents_NB + more).clamp(-BIAS + 1, BIAS))
            for more in (0, 1, -1)
        ]

    def pack(self, numbers_NK: Tensor, scales_NB: Tensor) -> dict[str, Tensor]:
        exponents_NB = torch.frexp(scales_NB).exponent - 1
        return {
            CODES: pack_nibbles(e2m1_codes(numbers_NK)),
            SCALES: (exponents_NB + BIAS).to(torch.uint8),
        }


class MXFP4Encoder(Encoder):
    """Blocks of 32 weights."""

    name = "mxfp4"

    def encoding(self, shape: tuple[int, int], stacked: int = 1) -> Encoding:
        found = MXFP4(rows=1, columns=32)
        found.parts(shape)
        return found

    def grid(self, weights_NK: Tensor, encoding: Encoding) -> Grid:
        return MXFP4Grid(encoding=encoding)
