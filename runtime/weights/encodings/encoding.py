"""The contract of all encodings: the way in which bytes stand for the weights of a matrix.

A coded matrix consists of a few tensors, its *parts*. All encodings know the first two:

    codes     [N, bytes of a row]             numbers of 4 or 8 bits, ascending along K; of two in a
                                              byte the first is the low half
    scales    [N / rows, ceil(K / columns)]   what `rows` x `columns` codes are multiplied by

N is the output of the product (rows), K the summed dimension. The first dimension of every part
divides as N does, so matrices are stacked (gate above up) by stacking their parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from runtime.weights.arena import Specs

CODES = "codes"
SCALES = "scales"


@dataclass(frozen=True, kw_only=True)
class Encoding(ABC):
    """How bytes stand for weights; two that are equal are run by the same kernels."""

    name: ClassVar[str]
    """As users see it, e.g. "mxfp4"."""
    bits: ClassVar[int]
    """Bits of a code."""

    rows: int = 1
    """Rows that share a scale."""
    columns: int
    """Columns that share a scale."""

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> Specs:
        """Shapes and dtypes of the parts of a matrix [N, K], by name, in the order of a block.

        Raises ValueError where a matrix of that shape cannot be coded so.
        """

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weights [N, K], rounded to `dtype` as transformers rounds them; on any device."""

    def _require_whole(self, shape: tuple[int, int]) -> None:
        """Raise ValueError unless the matrix divides into blocks, and its rows into bytes."""
        rows, columns = shape
        if rows % self.rows or columns % self.columns or columns * self.bits % 8:
            raise self._unfit(shape)

    def _unfit(self, shape: tuple[int, int]) -> ValueError:
        """The error about a matrix that cannot be coded so."""
        rows, columns = shape
        return ValueError(
            f"a matrix of {rows} x {columns} has no {self.name} of {self.rows} x {self.columns}"
        )
