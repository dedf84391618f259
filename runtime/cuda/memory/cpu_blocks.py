"""Expert blocks as the kernels on the CPU read them where they lie."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.cpu import ExpertShape, ExpertTable, MatrixParts, Packing, SumOrder
from runtime.cuda.memory.expert_block import CHUNK, ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.weights.encodings.coded import part_name
from runtime.weights.gated_experts import UNGATED

MATRICES = ("gate_up_proj", "down_proj")


def cpu_shape(
    layout: KernelLayout, block: ExpertBlock, gate_up: SumOrder, down: SumOrder
) -> ExpertShape:
    """The shape of the experts in such blocks, summed in these orders.

    Raises ValueError for experts without a gate, which have no C kernels.
    """
    if layout.activation == UNGATED:
        raise ValueError(f"the CPU kernels have no activation {UNGATED}")
    codings = [block.coding[name].encoding for name in MATRICES if name in block.coding]
    packing = _packing(block) if block.patches else None
    encodings = (codings[0], codings[1]) if codings else None
    return ExpertShape.of(layout, gate_up, down, packing=packing, encodings=encodings)


def cpu_table(block: ExpertBlock, addresses: Sequence[int], num_experts: int) -> ExpertTable:
    """Where the parts of stored blocks are, one block after the other from each layer's address."""
    gate_up, down = (_parts(block, name) for name in MATRICES)
    return ExpertTable.of_blocks(addresses, 2 * block.stored_units, gate_up, down, num_experts)


def _packing(block: ExpertBlock) -> Packing:
    gate_up, down = (block.fields[name].start for name in MATRICES)
    return Packing(
        matrices=block.matrix_units, chunk=CHUNK, patches=block.patches, gate_up=gate_up, down=down
    )


def _parts(block: ExpertBlock, name: str) -> MatrixParts:
    """The parts of a matrix, from the start of a stored block."""
    bias = 2 * block.start_stored(f"{name}_bias")
    if block.patches:
        return MatrixParts.packed(_packing(block), block.fields[name].start, bias)
    if not block.coding:
        return MatrixParts(codes=2 * block.fields[name].start, bias=bias)
    fields, names = block.stored_fields, block.coding[name].parts
    starts = [2 * fields[part_name(name, part)].start for part in names]
    codes, scales, extra = (starts + [0] * 3)[:3]
    return MatrixParts(codes, scales, extra, bias)
