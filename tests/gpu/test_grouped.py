"""Grouped products on a GPU: weights that are decoded in registers are those that torch decodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.prefill.products import Products, Work, arranged, sort
from runtime.cuda.prefill.tiling import Tiles, heights_for, most_tiles
from runtime.weights.encodings.coded import part_name
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from tests.gpu.offloaded import needs_gpu
from tests.helpers.device_twins import coding_of, draw_parts, specs_of

pytestmark = needs_gpu

BF16 = torch.bfloat16
EXPERTS = 3
ENCODINGS: dict[str, Callable[[int, int], Encoding]] = {
    "mxfp4": lambda n, k: MXFP4(),
    "int4": lambda n, k: Int4Group(columns=32),
    "int4 with zeros": lambda n, k: Int4Group(columns=128, zeros=True),
    "int4 in fp16": lambda n, k: Int4Group(columns=32, scale=torch.float16),
    "fp8": lambda n, k: FP8Block(rows=128, columns=128),
    "nvfp4": lambda n, k: NVFP4(rows=n),
}
"""Of a matrix [N, K]."""


def blocks(encoding: Callable[[int, int], Encoding]) -> tuple[ExpertBlock, Tensor, Tensor]:
    """A block in codes, and experts of every code and many scales: as stored, and as torch decodes
    them, int16 [E, units].
    """
    specs = specs_of(LAYOUT)
    block = ExpertBlock(specs, 0, coding_of(specs, encoding))
    stored_EN = torch.zeros(EXPERTS, block.stored_units, dtype=torch.int16)
    plain_EN = torch.zeros(EXPERTS, block.units, dtype=torch.int16)
    for stored_N, plain_N in zip(stored_EN, plain_EN, strict=True):
        stored, plain = block.stored_views(stored_N), block.plain.views(plain_N)
        for name, matrix in block.coding.items():
            parts = {part: stored[part_name(name, part)] for part in matrix.parts}
            draw_parts(parts)
            if parts[CODES].dtype == torch.uint8:
                parts[CODES].random_(0, 256)
            if parts[SCALES].dtype == torch.uint8:
                parts[SCALES].random_(0, 250)
            elif parts[SCALES].dtype == BF16:  # of every size, and either sign
                exponents = torch.randint(-120, 120, parts[SCALES].shape)
                parts[SCALES].copy_(torch.randn(parts[SCALES].shape) * 2.0**exponents)
            plain[name].copy_(matrix.encoding.decode(parts, BF16))
    return block, stored_EN.cuda(), plain_EN.cuda()


LAYOUT = KernelLayout(
    hidden=256, width=128, transposed=False, has_bias=False, activation="silu", alternating=False,
    dtype=BF16,
)  # fmt: skip


def columns_of(block: ExpertBlock, slots_EN: Tensor, tiles: Tiles, expert: int) -> Tensor:
    """The second product of one expert with every unit vector: its matrix [K, N]."""
    ids_TK = torch.full((LAYOUT.width, 1), expert, device="cuda")
    work = Work.of(LAYOUT.width, EXPERTS, LAYOUT, ids_TK.device)
    counts_E = torch.zeros(EXPERTS, dtype=torch.int32, device="cuda")
    slots_E = torch.arange(EXPERTS, dtype=torch.int32, device="cuda")
    sort(ids_TK, work, counts_E, slots_E, EXPERTS, tiles.rows)
    products = Products(block, slots_EN, LAYOUT)
    units_PW = torch.eye(LAYOUT.width, dtype=BF16, device="cuda")
    work.h_PW.copy_(arranged(units_PW, products.h_order))
    products.run_down(work, tiles.down, 0, most_tiles(LAYOUT.width, EXPERTS, tiles.rows))
    return work.y_PH


@pytest.mark.parametrize("height", range(2))
@pytest.mark.parametrize("name", ENCODINGS)
def test_weights_decoded_in_registers_have_the_bits_of_torch(name: str, height: int) -> None:
    torch.manual_seed(0)
    block, stored_EN, plain_EN = blocks(ENCODINGS[name])
    tiles = heights_for(block)[height]
    for expert in range(EXPERTS):
        found = columns_of(block, stored_EN, tiles, expert)
        expected = columns_of(block.plain, plain_EN, tiles, expert)
        assert found.isfinite().all()
        assert found.count_nonzero() > found.numel() / 2
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
        weights = block.plain.views(plain_EN)["down_proj"][expert].T
        is_normal = weights.abs() >= torch.finfo(BF16).smallest_normal
        assert torch.equal(found[is_normal], weights[is_normal])
