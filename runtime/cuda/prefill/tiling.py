"""Tiles of the grouped products: their sizes, by the mean rows of an expert, and their tables.

Everything here follows from the number of tokens alone, never from what is resident or routed: a
token's result must not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_DECODED_ROWS = 256
"""Mean rows of an expert up to which weights are decoded in the products. On an H200 that costs a
layer of 64 experts of 6.3 million weights 0.11 to 0.15 ms for every 128 rows, by count of
instructions; unpacking them first costs 0.3 ms of memory traffic, reading them again 0.2 ms, and
three launches for as many experts as the workspace holds."""


class Tile(NamedTuple):
    """A program's part of a matrix product, and how it is compiled."""

    rows: int
    columns: int
    inner: int = 64
    """Of the summed dimension, at a time."""
    warps: int = 4
    stages: int = 3
    """Loads under way."""


class Tiles(NamedTuple):
    """Of the two products; they share their rows."""

    gate_up: Tile
    down: Tile

    @property
    def rows(self) -> int:
        return self.gate_up.rows

    @staticmethod
    def of(num_rows: float) -> Tiles:
        """The least height that so many rows of an expert fill, else the greatest."""
        return next((tiles for tiles in TILES if num_rows <= tiles.rows), TILES[-1])


TILES = (
    Tiles(Tile(16, 64, 128), Tile(16, 64, 128)),
    Tiles(Tile(64, 64), Tile(64, 64, 128)),
    Tiles(Tile(128, 64, warps=8), Tile(128, 128, warps=8)),
)
"""Ascending. By `benchmarks.kernels` on an H100, within the memory of smaller GPUs."""


class Tiling(NamedTuple):
    """How a call of P pairs over E experts is cut."""

    tiles: Tiles
    unpacks: bool
    """Whether stored weights are made plain before the products."""

    @staticmethod
    def of(num_pairs: int, num_experts: int, *, is_plain: bool) -> Tiling:
        """is_plain: weights are stored as they are."""
        mean = num_pairs / num_experts
        return Tiling(Tiles.of(mean), not is_plain and mean > MOST_DECODED_ROWS)


def most_tiles(num_pairs: int, num_experts: int, height: int) -> int:
    """The most tiles that so many pairs of so many experts can have."""
    return min(num_pairs, num_pairs // height + num_experts)


class Table(NamedTuple):
    """Tiles of several groups of experts, on the host."""

    tiles_N3: np.ndarray
    """int32: first row, number of rows, slot."""
    starts_G: np.ndarray
    """int32 [groups + 1], each group's first tile, and the end."""


def table_of(
    experts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]], counts_E: np.ndarray,
    height: int,
) -> Table:  # fmt: skip
    """The tiles of groups of experts, whose rows are sorted by expert.

    slots: of each group's experts. counts_E: int, the rows of every expert.
    """
    chosen = np.concatenate([np.asarray(some, np.int64) for some in experts])
    places = np.concatenate([np.asarray(some, np.int64) for some in slots])
    counts, first = counts_E[chosen], (np.cumsum(counts_E) - counts_E)[chosen]
    heights = -(-counts // height)
    owner_N = np.repeat(np.arange(len(chosen)), heights)
    nth_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(heights) - heights, heights)
    rows_N = np.minimum(counts[owner_N] - nth_N * height, height)
    tiles_N3 = np.stack([first[owner_N] + nth_N * height, rows_N, places[owner_N]], 1)
    ends = np.append(0, np.cumsum(heights))
    starts_G = ends[np.cumsum([0, *map(len, experts)])]
    return Table(tiles_N3.astype(np.int32), starts_G.astype(np.int32))
