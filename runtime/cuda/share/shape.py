"""The experts of a GPU's host tier, in the sums of the kernels that a step was captured with."""

from __future__ import annotations

from typing import Any

import torch

from runtime.cpu.shape import HALVES, ExpertShape, SumOrder
from runtime.cuda.decode.experts.blocks import Blocks
from runtime.cuda.memory.cpu_blocks import cpu_shape
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.share.sum_order import row_sums


def shape_of(layout: KernelLayout, block: ExpertBlock, compiled: dict[str, Any]) -> ExpertShape:
    """The experts of `block`, in the sums of the compiled kernels `gate_up` and `down`.

    Raises ValueError where the CPU has no such sums.
    """
    if layout.dtype != torch.bfloat16:
        raise ValueError(f"its kernels take experts of bfloat16, not {layout.dtype}")
    tiles = Blocks.of(1, layout, block)
    gate_up = _order(compiled["gate_up"], tiles.columns, tiles.rows, block)
    down = _order(compiled["down"], tiles.down_columns, tiles.down_rows, block)
    return cpu_shape(layout, block, gate_up, down)


def _order(kernel: Any, columns: int, rows: int, block: ExpertBlock) -> SumOrder:
    if kernel is None:
        raise ValueError("the GPU's kernels are interpreted")
    sums = row_sums(kernel.asm["ttgir"])
    if not block.patches:
        return SumOrder(columns=columns, rows=rows, steps=sums[0], patch_steps=HALVES)
    patches, products = sums[:2]  # a row's patches are summed before its lanes
    return SumOrder(columns=columns, rows=rows, steps=products, patch_steps=patches)
