"""Places of rows' positions in a layer's memory.

WholeRows  [R, heads, context, width], a row in one piece
Paged      [pages, heads, page, width]; a table says which pages a row has

Pages whose numbers go beyond those of the device are spilled: they lie in host memory, [*, heads,
page, width]. They are a row's first ones and full, so that whatever is written lies on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

PAGE = 64
"""Positions of a page: the longest block of keys that the attention kernel takes at a time."""


class Spilled(NamedTuple):
    """A layer's keys and values in pages of host memory."""

    keys: Tensor
    values: Tensor


class Places(Protocol):
    """How the memory of keys and values is laid out."""

    def at(self, rows_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Where in memory [*, heads, *, width] positions of rows are: indices of both axes."""

    def row(self, states: Tensor, row: int, length: int, spilled: Tensor | None = None) -> Tensor:
        """[1, heads, length, width], the beginning of a row. spilled: its pages in host memory."""

    def copies(self, states: Tensor, rows_N: Tensor, length: int) -> Tensor:
        """[N, heads, length, width], copies of the beginnings of rows without spilled pages, as
        those are that are being written.
        """


class WholeRows:
    """Every row in one piece."""

    def at(self, rows_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        return rows_B, positions_B

    def row(self, states: Tensor, row: int, length: int, spilled: Tensor | None = None) -> Tensor:
        return states[row : row + 1, ..., :length, :]

    def copies(self, states: Tensor, rows_N: Tensor, length: int) -> Tensor:
        return states[..., :length, :][rows_N]


def _nothing(_: int) -> Sequence[int]:
    return ()


class Paged:
    """Every row in pages.

    table_RN: int32, the page of each row's first positions, of its next ones, and so on; any page
    of the device where the row has none. page: positions of each. spilled_of: tells of a row the
    places in host memory of its first pages, those that lie there.
    """

    def __init__(
        self, table_RN: Tensor, page: int, spilled_of: Callable[[int], Sequence[int]] = _nothing
    ) -> None:
        self.table_RN, self.page, self._spilled_of = table_RN, page, spilled_of

    @property
    def context(self) -> int:
        """Positions that a row can have."""
        return self.table_RN.shape[1] * self.page

    def at(self, rows_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.table_RN[rows_B, positions_B // self.page], positions_B % self.page

    def row(self, states: Tensor, row: int, length: int, spilled: Tensor | None = None) -> Tensor:
        away = [] if spilled is None else self._spilled_of(row)[: -(-length // self.page)]
        own = self.table_RN[row : row + 1, len(away) :]
        rest = self._joined(states, own, max(length - len(away) * self.page, 0))
        if spilled is None or not away:
            return rest
        first = [spilled[page].to(states.device, non_blocking=True) for page in away]
        return torch.cat([*first, rest[0]], dim=1)[None, :, :length]

    def copies(self, states: Tensor, rows_N: Tensor, length: int) -> Tensor:
        return self._joined(states, self.table_RN[rows_N], length)

    def _joined(self, states: Tensor, pages_NN: Tensor, length: int) -> Tensor:
        """The pages of each row side by side."""
        pages_NN = pages_NN[:, : -(-length // self.page)]
        heads = torch.arange(states.shape[1], device=states.device)
        return states[pages_NN[:, None], heads[:, None]].flatten(2, 3)[:, :, :length]
