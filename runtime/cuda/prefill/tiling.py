"""Tiles of the grouped products: their sizes, by the mean rows of an expert, and their tables.

Everything here follows from the number of tokens alone, never from what is resident or routed: a
token's result must not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.cuda.memory.expert_block import ExpertBlock

MOST_DECODED_ROWS = 256
"""Mean rows of an expert up to which weights are decoded in the products. Of a layer of 64 experts
of 6.3 million weights, an H200 takes 0.53 ms for 256 rows each where they are plain, 0.85 in mxfp4,
1.3 packed or in fp8; unpacking them first costs 0.3 ms of memory traffic, and three launches for
as many experts as the workspace holds."""


class Tile(NamedTuple):
    """A program's part of a matrix product, and how it is compiled."""

    rows: int
    columns: int
    inner: int = 64
    """Of the summed dimension, at a time."""
    warps: int = 4
    stages: int = 3
    """Loads under way."""
    turned: bool = False
    """Whether weights come first in the product, so that tensor cores take them from registers."""


class Tiles(NamedTuple):
    """Of the two products; they share their rows."""

    most: float
    """Mean rows of an expert up to which these are used."""
    gate_up: Tile
    down: Tile

    @property
    def rows(self) -> int:
        return self.gate_up.rows


Heights = tuple[Tiles, ...]
"""Ascending. By `benchmarks.kernels` on an H200, within the memory of smaller GPUs."""
PLAIN: Heights = (
    Tiles(24, Tile(32, 64, turned=True), Tile(32, 64, turned=True)),
    Tiles(96, Tile(64, 64), Tile(64, 64)),
    Tiles(math.inf, Tile(128, 64, warps=8), Tile(128, 128, warps=8)),
)
STORED: Heights = (
    Tiles(40, Tile(32, 64, 128, turned=True), Tile(32, 64, 128, turned=True)),
    Tiles(math.inf, Tile(64, 64, 128, turned=True), Tile(64, 64, 128, turned=True)),
)
"""Where weights are decoded. Higher tiles decode them less often, but lack registers."""
CODED: Heights = (
    STORED[0],
    Tiles(math.inf, STORED[1].gate_up, Tile(64, 128, 128, warps=8, turned=True)),
)
LEAST_ROWS = min(heights[0].rows for heights in (PLAIN, STORED))


def heights_for(block: ExpertBlock) -> Heights:
    """The tiles for weights as blocks store them."""
    if block.is_plain:
        return PLAIN
    return STORED if block.patches else CODED


class Tiling(NamedTuple):
    """How a call of P pairs over E experts is cut."""

    tiles: Tiles
    unpacks: bool
    """Whether stored weights are made plain before the products."""

    @staticmethod
    def of(num_pairs: int, num_experts: int, block: ExpertBlock) -> Tiling:
        """block: as experts are stored."""
        mean = num_pairs / num_experts
        unpacks = not block.is_plain and mean > MOST_DECODED_ROWS
        heights = PLAIN if unpacks else heights_for(block)
        return Tiling(next(tiles for tiles in heights if mean <= tiles.most), unpacks)


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
