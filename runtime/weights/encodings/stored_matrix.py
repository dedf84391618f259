"""A coded matrix as a checkpoint keeps it: which of its tensors are the parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.weights.encodings.encoding import Encoding

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Tensors of one matrix as stored, by part, to its parts in the encoding's own form."""


def unchanged(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conversion of a checkpoint that stores parts as the encoding has them."""
    return stored


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """One matrix, or one of each of E experts, whose tensors stand for weights."""

    encoding: Encoding
    shape: tuple[int, ...]
    """Of the weights in the orientation of the codes: [N, K], or [E, N, K] of stacked experts."""
    dtype: torch.dtype = torch.bfloat16
    """Number format of the weights where nobody asks for another."""
    sources: dict[str, str]
    """Checkpoint key of each stored part; with [E, ...] in front for stacked experts."""
    shared: frozenset[str] = frozenset()
    """Stored parts of stacked experts that all of them share: without E in front."""
    transposed: bool = False
    """The parameter that these weights stand for is [.., K, N], as gpt-oss has it."""
    convert: Convert = field(default=unchanged, compare=False)
    """Takes the stored tensors of one matrix."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that an unquantised checkpoint would have."""
        *stacked, rows, columns = self.shape
        return (*stacked, columns, rows) if self.transposed else self.shape
