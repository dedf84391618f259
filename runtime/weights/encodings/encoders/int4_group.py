"""The encoder of int4-group: sixteen whole numbers times a bfloat16 scale per group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.weights.encodings.encoders.grid import Encoder, Grid, pack_nibbles, shorten, steps
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.int4_group import Int4Group

LOWEST, HIGHEST = -8, 7
BITS = 5
"""Significant bits of a scale: number x scale then is exact in bfloat16."""
HITS = (7.0, 8.0, 6.0, 5.0)
"""Numbers that the largest weight may become, exactly; first the usual one."""
FACTORS = steps(-0.4, 0.25, 10)


@dataclass(frozen=True, kw_only=True)
class Int4Grid(Grid):
    """-8 to 7. Under a negative scale it reaches further up than down."""

    def round(self, ratios: Tensor) -> Tensor:
        return ratios.round().clamp_(LOWEST, HIGHEST)

    def scales(self, largest_NB: Tensor) -> list[Tensor]:
        wanted = [1 / hit for hit in HITS] + [factor / HIGHEST for factor in FACTORS]
        positive = [shorten(largest_NB * one, BITS) for one in wanted]
        return [signed for one in positive for signed in (one, -one)]

    def pack(self, numbers_NK: Tensor, scales_NB: Tensor) -> dict[str, Tensor]:
        return {
            CODES: pack_nibbles(numbers_NK - LOWEST),
            SCALES: scales_NB.to(torch.bfloat16),
        }


@dataclass(frozen=True, kw_only=True)
class Int4Encoder(Encoder):
    """Symmetric groups of `columns` weights."""

    columns: int = 32
    name = "int4"

    def encoding(self, shape: tuple[int, int], stacked: int = 1) -> Encoding:
        found = Int4Group(columns=self.columns, zeros=False, scale=torch.bfloat16)
        found.parts(shape)
        return found

    def grid(self, weights_NK: Tensor, encoding: Encoding) -> Grid:
        return Int4Grid(encoding=encoding)
