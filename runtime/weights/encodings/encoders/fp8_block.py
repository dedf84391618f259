"""The encoder of fp8-block: e4m3 times a float32 scale per 128 x 128 weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.weights.encodings.encoders.grid import Encoder, Grid, shorten, steps
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.fp8_block import FP8Block

SIDE = 128
LARGEST = 448.0
BITS = 4
"""Significant bits of a scale: number x scale then is exact in bfloat16."""
HITS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""Numbers that the largest weight may become, exactly: all from which a scale has an octave."""


@dataclass(frozen=True, kw_only=True)
class FP8Grid(Grid):
    """The finite numbers of e4m3."""

    def round(self, ratios: Tensor) -> Tensor:
        return ratios.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()

    def scales(self, largest_NB: Tensor) -> list[Tensor]:
        usual_NB = shorten(largest_NB * ((1 + 2**-BITS) / LARGEST), BITS)
        exact = [shorten(largest_NB / hit, BITS) for hit in HITS]
        clipping = [shorten(largest_NB * factor / LARGEST, BITS) for factor in steps(-0.3, -0.1, 2)]
        return [usual_NB, *exact, *clipping]

    def pack(self, numbers_NK: Tensor, scales_NB: Tensor) -> dict[str, Tensor]:
        return {CODES: numbers_NK.to(torch.float8_e4m3fn), SCALES: scales_NB.float()}


class FP8Encoder(Encoder):
    """Blocks of 128 x 128 weights; of fewer rows where 128 do not divide the matrix."""

    name = "fp8"

    def encoding(self, shape: tuple[int, int], stacked: int = 1) -> Encoding:
        rows = math.gcd(SIDE, shape[0] // stacked)
        found = FP8Block(rows=rows, columns=SIDE, scale=torch.float32)
        found.parts(shape)
        return found

    def grid(self, weights_NK: Tensor, encoding: Encoding) -> Grid:
        return FP8Grid(encoding=encoding)
