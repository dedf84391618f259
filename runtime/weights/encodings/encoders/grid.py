"""The contract of all encoders: the numbers that codes stand for, and scales to choose from.

A matrix [N, K] is rounded in blocks of `rows` x `columns` weights. The weights of a block become

    number x scale      the number out of the grid, the scale out of those that can be stored

Scales are short: as many significant bits as leave every product exact in bfloat16. So weights that
were decoded are found again, whatever their scale was, and encoding them a second time loses
nothing. Finer scales were tried and gave no better weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.weights.encodings.encoding import Encoding


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """The numbers of one encoding, and the scales of one matrix."""

    encoding: Encoding

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.encoding.rows

    @property
    def columns(self) -> int:
        """Columns of a block; the last of a row may have fewer."""
        return self.encoding.columns

    @abstractmethod
    def round(self, ratios: Tensor) -> Tensor:
        """The nearest numbers of the grid, as float32."""

    @abstractmethod
    def scales(self, largest_NB: Tensor) -> list[Tensor]:
        """Scales to choose from, each [N / rows, B] for B blocks side by side.

        largest_NB: the largest magnitude of each block, above 0. The first scale is the usual one,
        by the largest weight alone.
        """

    @abstractmethod
    def pack(self, numbers_NK: Tensor, scales_NB: Tensor) -> dict[str, Tensor]:
        """The parts of the matrix, from numbers of the grid and the scale of each block."""


class Encoder(ABC):
    """A way to make an encoding's parts out of plain weights."""

    name: str
    """As users ask for it."""

    @abstractmethod
    def encoding(self, shape: tuple[int, int], stacked: int = 1) -> Encoding:
        """The encoding of a matrix of `stacked` equal matrices on top of each other.

        Raises ValueError where a matrix [N, K] of that shape cannot be coded so.
        """

    @abstractmethod
    def grid(self, weights_NK: Tensor, encoding: Encoding) -> Grid:
        """The grid for these weights."""


def shorten(scales: Tensor, bits: int) -> Tensor:
    """The nearest numbers of `bits` significant bits."""
    mantissas, exponents = torch.frexp(scales)
    return torch.ldexp(torch.round(mantissas * 2**bits) / 2**bits, exponents)


def steps(first: float, last: float, count: int) -> list[float]:
    """Factors from 2^first to 2^last, evenly spaced as powers of 2."""
    return [2 ** (first + (last - first) * i / (count - 1)) for i in range(count)]


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """Codes of 4 bits, two in a byte: the even column in the low half."""
    pairs = codes_NK.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)
