"""Candidate tiles of the experts' kernels."""

from __future__ import annotations

from itertools import product

import triton

from runtime.cuda.decode.experts.blocks import LEAST_COLUMNS, Blocks
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.prefill.tiling import Tile

PLAIN = {
    32: [
        Tile(32, 64, turned=True), Tile(32, 64, 128, turned=True), Tile(32, 64, 128),
        Tile(32, 128, warps=8, turned=True), Tile(32, 64, stages=4, turned=True),
    ],
    64: [
        Tile(64, 64), Tile(64, 64, turned=True), Tile(64, 64, 128, turned=True),
        Tile(64, 128, warps=8), Tile(64, 128, turned=True), Tile(64, 64, stages=4),
    ],
    128: [
        Tile(128, 64, turned=True), Tile(128, 64, warps=8), Tile(128, 128, warps=8),
        Tile(128, 128, warps=8, turned=True), Tile(128, 128, 32, warps=8, stages=4, turned=True),
    ],
}  # fmt: skip
"""Tiles by their rows."""
STORED = {
    rows: [
        Tile(rows, columns, inner, warps=columns // 16, stages=stages, turned=True)
        for columns, inner, stages in product((64, 128), (64, 128, 256), (2, 3))
        if (rows + columns) * inner * stages <= 192 * 128 * 3
    ]
    for rows in PLAIN
}
"""The same where weights are decoded."""


def tiles(rows: int, in_use: Tile, *, is_plain: bool) -> list[Tile]:
    """Candidates for a grouped product of `rows` rows a tile, the one in use first."""
    known = PLAIN if is_plain else STORED
    return list(dict.fromkeys([in_use, *known[rows]]))


def blocks(kernel: str, in_use: Blocks, layout: KernelLayout) -> list[Blocks]:
    """Candidates for one decode kernel, the one in use first."""
    heights = (4, 8) if in_use.padded == 1 else (16, 32, 64)
    widths = (512, 1024, 2048) if in_use.padded == 1 else (LEAST_COLUMNS, 256)
    limit = layout.hidden if kernel == "gate_up" else layout.width
    if in_use.padded == 1:
        widths = tuple({min(width, triton.next_power_of_2(limit)) for width in widths})
    names = ["rows", "columns", "warps"]
    if kernel == "down":
        names = [f"down_{name}" for name in names]
    found = [in_use]
    for height, width in product(heights, sorted(widths)):
        for warps in (4, 8) if in_use.padded == 1 or width == max(widths) else (4,):
            sizes = height, width, warps
            found.append(in_use._replace(**dict(zip(names, sizes, strict=True))))
    if kernel == "down" and in_use.padded > 1:
        found += [in_use._replace(parts=parts) for parts in (1, 2, 4, 8)]
    return list(dict.fromkeys(found))


CODED = {
    ("gate_up", True): [
        (8, 1024, 4), (4, 1024, 4), (4, 1024, 2), (8, 1024, 8), (16, 1024, 8), (8, 512, 4),
        (4, 2048, 4), (8, 2048, 8),
    ],
    ("down", True): [
        (4, 1024, 4), (8, 1024, 4), (8, 1024, 8), (4, 1024, 8), (2, 1024, 2), (4, 512, 2),
        (8, 512, 4), (16, 512, 8),
    ],
    ("gate_up", False): [(32, 128, 4), (16, 128, 4), (16, 256, 4), (32, 256, 8)],
    ("down", False): [(32, 128, 4), (16, 128, 4), (16, 256, 4), (32, 256, 8)],
}  # fmt: skip
"""Rows, columns and warps of kernels that decode, by kernel and whether it has a single token."""


def coded_blocks(kernel: str, in_use: Blocks, layout: KernelLayout) -> list[Blocks]:
    """Candidates for one decode kernel over experts in codes, the one in use first."""
    limit = triton.next_power_of_2(layout.hidden if kernel == "gate_up" else layout.width)
    names = ["rows", "columns", "warps"]
    if kernel == "down":
        names = [f"down_{name}" for name in names]
    found = [in_use]
    for rows, columns, warps in CODED[kernel, in_use.padded == 1]:
        sizes = rows, min(columns, limit), warps
        found.append(in_use._replace(**dict(zip(names, sizes, strict=True))))
    return list(dict.fromkeys(found))


def blocks_text(kernel: str, blocks: Blocks) -> str:
    """The sizes of a kernel's blocks, as the table shows them."""
    if kernel == "gate_up":
        return str((blocks.rows, blocks.columns, blocks.warps))
    return str((blocks.down_rows, blocks.down_columns, blocks.down_warps, blocks.parts))
