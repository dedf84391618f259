"""The encoder of nvfp4: e2m1 times an e4m3 scale per 16 weights, times a scale of the matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.weights.encodings.encoders.e2m1 import LARGEST, e2m1_codes, round_to_e2m1
from runtime.weights.encodings.encoders.grid import Encoder, Grid, pack_nibbles, steps
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.nvfp4 import GLOBAL_SCALES, NVFP4

LARGEST_SCALE = 448.0
SMALLEST_SCALE = 2.0**-9
HITS = (6.0, 4.0, 3.0)
"""Numbers that the largest weight may become, exactly."""
FACTORS = steps(-0.5, 0.5, 9)


@dataclass(frozen=True, kw_only=True)
class NVFP4Grid(Grid):
    """e2m1 under scales of e4m3 times that of the matrix."""

    global_scales_N: Tensor
    """[N / encoding.rows], powers of 2: a block's scale has all bits that e4m3 gives it."""

    @property
    def rows(self) -> int:
        return 1

    def round(self, ratios: Tensor) -> Tensor:
        return round_to_e2m1(ratios)

    def scales(self, largest_NB: Tensor) -> list[Tensor]:
        wanted = [1 / hit for hit in HITS] + [factor / LARGEST for factor in FACTORS]
        of_row_N1 = self._of_rows(len(largest_NB))
        return [self._stored(largest_NB * one / of_row_N1).float() * of_row_N1 for one in wanted]

    def pack(self, numbers_NK: Tensor, scales_NB: Tensor) -> dict[str, Tensor]:
        return {
            CODES: pack_nibbles(e2m1_codes(numbers_NK)),
            SCALES: self._stored(scales_NB / self._of_rows(len(scales_NB))),
            GLOBAL_SCALES: self.global_scales_N,
        }

    def _of_rows(self, num_rows: int) -> Tensor:
        return self.global_scales_N.repeat_interleave(num_rows // len(self.global_scales_N))[
            :, None
        ]

    def _stored(self, scales_NB: Tensor) -> Tensor:
        return scales_NB.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float8_e4m3fn)


class NVFP4Encoder(Encoder):
    """Blocks of 16 weights."""

    name = "nvfp4"

    def encoding(self, shape: tuple[int, int], stacked: int = 1) -> Encoding:
        found = NVFP4(rows=shape[0] // stacked, columns=16, divides=False)
        found.parts(shape)
        return found

    def grid(self, weights_NK: Tensor, encoding: Encoding) -> Grid:
        largest_N = weights_NK.unflatten(0, (-1, encoding.rows)).abs().amax((1, 2))
        largest_N = torch.where(largest_N > 0, largest_N, 1.0)
        exponents_N = (largest_N / (LARGEST * LARGEST_SCALE)).log2().ceil()
        return NVFP4Grid(encoding=encoding, global_scales_N=exponents_N.exp2())
