"""Places of rows' positions in a layer's memory.

WholeRows  [R, heads, context, width], a row in one piece
Paged      [pages, heads, page, width]; a table says which pages a row has
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

PAGE = 64
"""Positions of a page: the longest block of keys that the attention kernel takes at a time."""


class Places(Protocol):
    """How the memory of keys and values is laid out."""

    def at(self, rows_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Where in memory [*, heads, *, width] positions of rows are: indices of both axes."""

    def row(self, states: Tensor, row: int, length: int) -> Tensor:
        """[1, heads, length, width], the beginning of a row."""

    def copies(self, states: Tensor, rows_N: Tensor, length: int) -> Tensor:
        """[N, heads, length, width], copies of the beginnings of rows."""


class WholeRows:
    """Every row in one piece."""

    def at(self, rows_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        return rows_B, positions_B

    def row(self, states: Tensor, row: int, length: int) -> Tensor:
        return states[row : row + 1, ..., :length, :]

    def copies(self, states: Tensor, rows_N: Tensor, length: int) -> Tensor:
        return states[..., :length, :][rows_N]


class Paged:
    """Every row in pages.

    table_RN: int32, the page of each row's first positions, of its next ones, and so on; any page
    where the row has none. page: positions of each.
    """

    def __init__(self, table_RN: Tensor, page: int) -> None:
        self.table_RN, self.page = table_RN, page

    @property
    def context(self) -> int:
        """Positions that a row can have."""
        return self.table_RN.shape[1] * self.page

    def at(self, rows_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.table_RN[rows_B, positions_B // self.page], positions_B % self.page

    def row(self, states: Tensor, row: int, length: int) -> Tensor:
        return self._joined(states, self.table_RN[row : row + 1], length)

    def copies(self, states: Tensor, rows_N: Tensor, length: int) -> Tensor:
        return self._joined(states, self.table_RN[rows_N], length)

    def _joined(self, states: Tensor, pages_NN: Tensor, length: int) -> Tensor:
        """The pages of each row side by side."""
        pages_NN = pages_NN[:, : -(-length // self.page)]
        heads = torch.arange(states.shape[1], device=states.device)
        return states[pages_NN[:, None], heads[:, None]].flatten(2, 3)[:, :, :length]
