"""Experts of one shape in every encoding, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.common.encodings import ENCODINGS
from benchmarks.kernels.random_parts import fill
from runtime.cpu import ExpertShape, SumOrder
from runtime.cpu.shape import Steps
from runtime.cpu.slot_experts import shape_of
from runtime.cuda.memory.cpu_blocks import cpu_shape
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.weights.arena import Spec
from runtime.weights.encodings.coded import CodedMatrix, part_name
from runtime.weights.gated_experts import KernelLayout
from runtime.weights.packed.packing import PATCHES

IN_THREADS: Steps = ((1, 4), (64, 2), (32, 2), (16, 2), (8, 2), (4, 2))
"""A sum over 128 lanes as four warps of a GPU may have it."""
AS_ON_A_GPU = SumOrder(columns=1024, steps=IN_THREADS, rows=4)
"""For packed weights and codes; plain ones are summed as without a GPU."""


class RandomExperts:
    """Blocks [E] of an encoding, all the same expert in memory of its own."""

    def __init__(self, kind: str, hidden: int, width: int, experts: int) -> None:
        torch.manual_seed(0)
        self.kind = kind
        shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
        specs = {name: Spec(shape, torch.bfloat16) for name, shape in shapes.items()}
        coding = {}
        if kind in ENCODINGS:
            rows = {name: shape[0] // (2 if "up" in name else 1) for name, shape in shapes.items()}
            coding = {
                name: CodedMatrix(ENCODINGS[kind](rows[name], shape[1]), shape, False)
                for name, shape in shapes.items()
            }
        self.block = ExpertBlock(specs, PATCHES[0] if kind == "packed" else 0, coding)
        self.layout = KernelLayout(
            hidden=hidden, width=width, activation="silu", alternating=False, transposed=False,
            has_bias=False, dtype=torch.bfloat16,
        )  # fmt: skip
        self.blocks = self._stored().repeat(experts, 1)

    def _stored(self) -> Tensor:
        """One block, int16."""
        if self.block.coding:
            stored = torch.zeros(self.block.stored_units, dtype=torch.int16)
            views = self.block.stored_views(stored)
            for name, matrix in self.block.coding.items():
                divides = bool(getattr(matrix.encoding, "divides", False))
                fill({p: views[part_name(name, p)] for p in matrix.parts}, divides=divides)
            return stored
        units = torch.zeros(self.block.units, dtype=torch.int16)
        for view in self.block.views(units).values():
            view.copy_(torch.randn(view.shape) * 0.02)
        kept = self.block.store(units)
        assert kept is not None, "random weights have few outliers"
        return kept

    @property
    def shape(self) -> ExpertShape:
        """With sums in a GPU's order, but for plain weights."""
        if self.block.is_plain:
            return shape_of(self.layout)
        return cpu_shape(self.layout, self.block, AS_ON_A_GPU, AS_ON_A_GPU)

    @property
    def num_bytes(self) -> int:
        """Bytes of an expert that are read."""
        return 2 * self.block.stored_units
