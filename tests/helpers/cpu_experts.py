"""Blocks of experts of any shape and encoding, and their outputs in the written-down order."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.cpu import ExpertShape, ExpertTable, Packing, SumOrder
from runtime.cpu.shape import Steps
from runtime.cuda.memory.cpu_blocks import cpu_table
from runtime.cuda.memory.expert_block import CHUNK, ExpertBlock
from runtime.weights.arena import Spec
from runtime.weights.encodings.coded import CodedMatrix, part_name
from runtime.weights.packed.packing import unpack
from tests.helpers import written_order as reference

IN_THREADS: Steps = ((1, 4), (64, 2), (32, 2), (16, 2), (8, 2), (4, 2))
"""128 lanes as a GPU's threads may have them."""
NARROW: Steps = ((2, 4), (16, 2), (8, 2), (1, 2))
"""32 lanes, pairs of which are left to the end."""
CHAINED: Steps = ((1, 8, 256, 4), (128, 2), (64, 2), (32, 2), (16, 2), (8, 2))
"""1,024 lanes, of which a thread sums 32 in one chain."""
SPECIAL = (0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x807F, 0x0080, 0x7149, 0xF149)
"""bfloat16: zeros, infinities, a NaN, subnormals, the smallest normal number, +-1e30."""
FINITE = SPECIAL[:2] + SPECIAL[5:]
LARGE = 0x7A80
"""2^118, bfloat16."""


class Case:
    """A shape, blocks of experts of it, and the reference's products with one expert's matrices."""

    def __init__(self, shape: ExpertShape, special: tuple[int, ...] = (), patches: int = 0) -> None:
        self.shape, self.special = shape, special
        self.outliers: dict[int, int] = {}
        """Bits of single weights, by their place in an unpacked block."""
        self.exponents = (0, 256) if special else (110, 125)
        """Of scales that are powers of two: from the first to below the second."""
        self.specs = {
            "gate_up_proj": Spec((2 * shape.width, shape.hidden), torch.bfloat16),
            "down_proj": Spec((shape.hidden, shape.width), torch.bfloat16),
        }
        if shape.has_bias:
            self.specs |= {
                "gate_up_proj_bias": Spec((2 * shape.width,), torch.bfloat16),
                "down_proj_bias": Spec((shape.hidden,), torch.bfloat16),
            }
        encodings = shape.encodings
        coding = {
            name: CodedMatrix(encoding, self.specs[name].shape, False)  # type: ignore[arg-type]
            for name, encoding in zip(("gate_up_proj", "down_proj"), encodings or (), strict=False)
        }
        self.block = ExpertBlock(self.specs, patches, coding)

    def sprinkled(self, values: Tensor, share: float, special: tuple[int, ...]) -> Tensor:
        """The values, bfloat16, with special ones among them."""
        if special:
            chosen = torch.tensor(special, dtype=torch.int32).to(torch.int16)
            where = torch.rand(values.shape) < share
            drawn = chosen[torch.randint(len(chosen), values.shape)]
            values.view(torch.int16)[where] = drawn[where]
        return values

    def blocks(self, experts: int) -> Tensor:
        """Stored blocks, int16 [E, *]."""
        return torch.stack([self.stored() for _ in range(experts)])

    def stored(self) -> Tensor:
        if self.shape.encodings:
            stored = torch.zeros(self.block.stored_units, dtype=torch.int16)
            for name, view in self.block.stored_views(stored).items():
                self.fill(name, view)
            return stored
        units = torch.zeros(self.block.units, dtype=torch.int16)
        for view in self.block.views(units).values():
            usual = (torch.randn(view.shape) * 0.05).bfloat16()
            view.copy_(self.sprinkled(usual, 0.002, self.special))
        for unit, bits in self.outliers.items():
            units[unit] = np.uint16(bits).astype(np.int16).item()
        packed = self.block.store(units)
        assert packed is not None
        return packed

    def fill(self, name: str, view: Tensor) -> None:
        """Draw a part of a coded expert."""
        if name.endswith("bias"):
            view.copy_((torch.randn(view.shape) * 0.05).bfloat16())
        elif name.endswith("codes"):
            view.view(torch.uint8).random_(0, 256)
            if view.dtype == torch.float8_e4m3fn and not self.special:
                view.copy_((torch.randn(view.shape) * 40).clamp(-448, 448))
        elif view.dtype == torch.uint8:
            view.random_(
                *(self.exponents if "scale" in name else (0, 256) if self.special else (4, 12))
            )
        elif view.dtype == torch.float8_e4m3fn:
            view.copy_(torch.rand(view.shape) * 16)
        else:
            view.copy_(torch.rand(view.shape) * 0.01 + 0.001)
            if self.special and view.dtype == torch.bfloat16:
                view.copy_(self.sprinkled(view.clone(), 0.01, (*FINITE, LARGE)))
            elif self.special:  # every other one
                view.flatten()[::2].mul_(1e-36)

    def table(self, blocks: Tensor) -> ExpertTable:
        return cpu_table(self.block, [blocks.data_ptr()], len(blocks))

    def expected(self, stored: Tensor, x_H: Tensor) -> np.ndarray:
        """The reference's output of the expert in a block."""
        shape = self.shape
        names = ("gate_up_proj", "down_proj")
        run = [
            partial(self.products, stored, name, order, first)
            for name, order, first in zip(names, (shape.gate_up, shape.down), (0, 1), strict=True)
        ]
        return reference.expert_output(shape, run[0], run[1], x_H)

    def products(
        self, stored: Tensor, name: str, order: SumOrder, number: int, x_K: np.ndarray
    ) -> np.ndarray:
        shape = self.shape
        if shape.encodings:
            encoding = shape.encodings[number]
            views = self.block.stored_views(stored)
            parts = {p: views[part_name(name, p)] for p in encoding.parts(self.specs[name].shape)}  # type: ignore[arg-type]
            if encoding.name == "mxfp4":
                sums = reference.mxfp4_sums(parts, x_K, order)
            else:
                weights = encoding.decode(parts, torch.bfloat16).float().numpy()
                sums = reference.row_sums(weights, x_K, order, reference.ORDERS[encoding.name])
        elif shape.packing:
            sums = self.packed_products(stored, name, order, number, x_K)
        else:
            weights = self.block.views(stored)[name].float().numpy()
            sums = reference.row_sums(weights, x_K, order, (0,))
        if shape.has_bias:
            start = self.block.start_stored(f"{name}_bias")
            bias = stored[start:][: len(sums)].view(torch.bfloat16).float().numpy()
            with np.errstate(all="ignore"):
                sums = sums + bias
        return sums

    def packed_products(
        self, stored: Tensor, name: str, order: SumOrder, number: int, x_K: np.ndarray
    ) -> np.ndarray:
        packing = self.shape.packing
        assert packing is not None
        size = packing.matrices * 3 // 2 + packing.matrices // CHUNK * 4 * packing.patches
        packed = stored.view(torch.uint8)[:size]
        units = unpack(packed, CHUNK, packing.patches).reshape(-1).view(torch.uint16).numpy()
        entries = packed[packing.matrices * 3 // 2 :].view(torch.int32).view(-1, packing.patches)
        first = (packing.gate_up, packing.down)[number]
        base = int(entries[first // CHUNK, 0])
        is_patch = np.zeros(packing.matrices, bool)
        for chunk, of_chunk in enumerate(entries[:, 1:].numpy()):
            is_patch[chunk * CHUNK + (of_chunk[of_chunk != 0] >> 16)] = True
        rows, width = self.specs[name].shape
        span = slice(first, first + rows * width)
        return reference.packed_sums(
            units[span].reshape(rows, width), x_K, order, base, is_patch[span].reshape(rows, width),
            first, self.programs(number, order), CHUNK, packing.patches,
        )  # fmt: skip

    def programs(self, number: int, order: SumOrder) -> np.ndarray:
        """The first row of the program that each row belongs to."""
        shape = self.shape
        if number:
            return np.arange(shape.hidden) // order.rows * order.rows
        first = np.arange(shape.width) // order.rows * order.rows
        if shape.alternating:
            return np.repeat(2 * first, 2)
        return np.concatenate([first, shape.width + first])


def shape_of(
    hidden: int, width: int, gate_up: SumOrder, down: SumOrder, **rest: Any
) -> ExpertShape:
    return ExpertShape(
        hidden=hidden, width=width, gate_up=gate_up, down=down, **{"activation": "silu"} | rest
    )


def packed_case(
    hidden: int, width: int, special: tuple[int, ...] = (), patches: int = 16, **rest: Any
) -> Case:
    up = -(-2 * width * hidden // CHUNK) * CHUNK
    packing = Packing(
        matrices=up + -(-width * hidden // CHUNK) * CHUNK,
        chunk=CHUNK,
        patches=patches,
        gate_up=0,
        down=up,
    )
    orders = rest.pop("orders", (
        SumOrder(columns=1024, steps=IN_THREADS, rows=8, patch_steps=PATCH_STEPS),
        SumOrder(columns=256, steps=NARROW, rows=4, patch_steps=PATCH_STEPS),
    ))  # fmt: skip
    shape = shape_of(hidden, width, *orders, packing=packing, **rest)
    return Case(shape, special, patches)


PATCH_STEPS: Steps = ((1, 4), (64, 2), (32, 2), (16, 2), (8, 2), (4, 2))
