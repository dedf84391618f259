"""Tile sizes of the kernels that run experts in captured steps."""

from __future__ import annotations

from typing import NamedTuple

import triton

from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout

LEAST_COLUMNS = 128
"""Least columns of a tile: a matrix product takes 16, and packed weights come by eights."""
DOWN_OF_ONE = {"int4-group": (512, 2), "fp8-block": (1024, 8)}
"""Columns and warps of a single token's down projection, where an encoding has its own."""


class Blocks(NamedTuple):
    """Tile sizes of the kernels, chosen for a batch size."""

    rows: int
    columns: int
    warps: int
    down_rows: int
    down_columns: int
    down_warps: int
    parts: int
    """Ranges of experts that are summed apart, so that their programs run side by side."""
    padded: int
    """Tokens, padded to the least size of a matrix product (1 needs none)."""

    @staticmethod
    def of(num_tokens: int, layout: KernelLayout, block: ExpertBlock) -> Blocks:
        """One token streams long rows; several go through the tensor cores in squarer tiles.

        Matrices in codes have gate and up rows in one tile. Sizes are by `benchmarks.kernels` on an
        H200.
        """
        coded = bool(block.coding)
        if num_tokens == 1:
            columns = min(1024, triton.next_power_of_2(layout.hidden))
            inner = min(1024, triton.next_power_of_2(layout.width))
            rows = 8
            if coded and layout.hidden > 2048:
                rows = 4
            elif coded:
                columns = min(512, columns)
            down_columns, down_warps = DOWN_OF_ONE.get(_encoding(block), (1024, 4))
            return Blocks(rows, columns, 4, 4, min(down_columns, inner), down_warps, 1, 1)
        padded = max(16, triton.next_power_of_2(num_tokens))
        columns = 2 * LEAST_COLUMNS if padded == 16 and not coded else LEAST_COLUMNS
        return Blocks(32, columns, 4, 32, LEAST_COLUMNS, 4, 8, padded)


def _encoding(block: ExpertBlock) -> str:
    matrix = block.coding.get("down_proj")
    return "" if matrix is None else matrix.encoding.name
