"""The experts of a GPU's host tier as the CPU's kernels see them."""

from __future__ import annotations

from typing import Any

import torch

from runtime.cpu.service import ExpertTable, MatrixParts
from runtime.cpu.shape import HALVES, ExpertShape, Packing, SumOrder
from runtime.cuda.decode.experts.blocks import Blocks
from runtime.cuda.memory.expert_block import CHUNK, ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.memory.pinned_experts import PinnedExperts
from runtime.cuda.share.sum_order import row_sums

GATE_UP, DOWN = "gate_up_proj", "down_proj"


def shape_of(layout: KernelLayout, block: ExpertBlock, compiled: dict[str, Any]) -> ExpertShape:
    """The experts of `block`, in the sums of the compiled kernels `gate_up` and `down`.

    Raises ValueError where the CPU has no such sums.
    """
    if layout.dtype != torch.bfloat16:
        raise ValueError(f"its kernels take experts of bfloat16, not {layout.dtype}")
    tiles = Blocks.of(1, layout, block)
    encodings = tuple(block.coding[name].encoding for name in (GATE_UP, DOWN) if block.coding)
    return ExpertShape(
        hidden=layout.hidden, width=layout.width, activation=layout.activation,
        alternating=layout.alternating, has_bias=layout.has_bias,
        gate_up=_order(compiled["gate_up"], tiles.columns, tiles.rows, block),
        down=_order(compiled["down"], tiles.down_columns, tiles.down_rows, block),
        packing=packing_of(block) if block.patches else None,
        encodings=encodings or None,  # type: ignore[arg-type]
    )  # fmt: skip


def packing_of(block: ExpertBlock) -> Packing:
    """The sizes of a packed block."""
    return Packing(
        matrices=block.matrix_units, chunk=CHUNK, patches=block.patches,
        gate_up=block.start(GATE_UP), down=block.start(DOWN),
    )  # fmt: skip


def _order(kernel: Any, columns: int, rows: int, block: ExpertBlock) -> SumOrder:
    if kernel is None:
        raise ValueError("the GPU's kernels are interpreted")
    sums = row_sums(kernel.asm["ttgir"])
    if not block.patches:
        return SumOrder(columns=columns, rows=rows, steps=sums[0], patch_steps=HALVES)
    patches, products = sums[:2]  # a row's patches are summed before its lanes
    return SumOrder(columns=columns, rows=rows, steps=products, patch_steps=patches)


def table_of(host: PinnedExperts, shape: ExpertShape) -> ExpertTable:
    """Where the CPU finds the parts of each expert."""
    block, layers = host.expert_blocks[0], host.layers
    addresses = [blocks_EN.data_ptr() for blocks_EN in layers]
    parts = [_parts(block, name, shape.packing) for name in (GATE_UP, DOWN)]
    return ExpertTable.of_blocks(addresses, 2 * block.stored_units, *parts, min(map(len, layers)))


def _parts(block: ExpertBlock, name: str, packing: Packing | None) -> MatrixParts:
    bias = 2 * block.start_stored(f"{name}_bias")
    if packing is not None:
        return MatrixParts.packed(packing, block.start(name), bias)
    code = block.code(name)
    if code is not None:
        return MatrixParts(code.codes, code.scales, max(code.extra, 0), bias)
    return MatrixParts(2 * block.start(name), bias=bias)
