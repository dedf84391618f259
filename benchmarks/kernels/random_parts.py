"""Random parts of the matrices of benchmarked experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.weights.encodings.encoding import CODES, SCALES
from runtime.weights.encodings.nvfp4 import GLOBAL_SCALES


def fill(parts: Mapping[str, Tensor], *, divides: bool) -> None:
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
        elif divides and name == GLOBAL_SCALES:
            part.copy_(torch.rand(part.shape, device=part.device) * 4e3 + 2e3)
        else:
            part.copy_(torch.rand(part.shape, device=part.device) * 4e-4 + 1e-4)
