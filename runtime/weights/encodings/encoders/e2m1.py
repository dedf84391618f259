"""The sixteen numbers of e2m1: a sign, two bits of exponent, one of mantissa."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Those of the codes 0 to 7; with bit 3 set they are negative."""
LARGEST = NUMBERS[-1]
MIDDLES = [(low + high) / 2 for low, high in pairwise(NUMBERS)]


def round_to_e2m1(ratios: Tensor) -> Tensor:
    """The nearest of the numbers."""
    table = torch.tensor(NUMBERS, device=ratios.device)
    return torch.copysign(table[_magnitudes(ratios)], ratios)


def e2m1_codes(numbers: Tensor) -> Tensor:
    """The codes 0 to 15 of numbers of the grid, uint8. Zero has the code 0, whatever its sign."""
    return _magnitudes(numbers).to(torch.uint8) | ((numbers < 0).to(torch.uint8) << 3)


def _magnitudes(ratios: Tensor) -> Tensor:
    return torch.bucketize(ratios.abs(), torch.tensor(MIDDLES, device=ratios.device))
