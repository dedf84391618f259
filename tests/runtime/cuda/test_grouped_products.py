"""Products of many tokens with weights that are decoded: orders of columns, scales, patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.kernels.grouped.columns import FAR, NATURAL, NEAR
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.kernel_layout import KernelLayout
from runtime.cuda.prefill.products import Products, Work, arranged, sort
from runtime.cuda.prefill.tiling import Tile, Tiles
from runtime.weights.encodings.coded import part_name
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.packed.packing import PATCHES
from tests.helpers import interpreter
from tests.helpers.device_twins import coding_of, draw_parts, specs_of

interpreter.mend()

BF16, CPU = torch.bfloat16, torch.device("cpu")
TILE = Tile(32, 64, 128, turned=True)
TILES = Tiles(1.0, TILE, TILE)
PAIRS = {NEAR.value: [(0, 2), (1, 3), (4, 6), (5, 7)], FAR.value: [(0, 4), (1, 5), (2, 6), (3, 7)]}


@pytest.mark.parametrize("order", PAIRS)
@pytest.mark.parametrize("columns", [64, 128, 1096])
def test_columns_lie_as_words_are_decoded_and_zeros_where_there_are_none(
    columns: int, order: int
) -> None:
    x_TH = 1.0 + torch.arange(2 * columns, dtype=torch.float32).view(2, columns)
    places = [
        64 * block + 8 * word + column
        for block in range(-(-columns // 64))
        for pair in PAIRS[order]
        for word in range(8)
        for column in pair
    ]
    padded_TH = torch.nn.functional.pad(x_TH, (0, len(places) - columns))
    assert torch.equal(arranged(x_TH, order), padded_TH[:, places])


def test_a_natural_order_copies_nothing() -> None:
    x_TH = torch.randn(2, 40)
    assert arranged(x_TH, NATURAL.value) is x_TH


def layout_of(hidden: int, width: int) -> KernelLayout:
    given: dict[str, Any] = {"transposed": False, "has_bias": False, "alternating": False}
    return KernelLayout(hidden=hidden, width=width, activation="silu", dtype=BF16, **given)


def computed(block: ExpertBlock, stored_N: Tensor, layout: KernelLayout, x_TH: Tensor) -> Tensor:
    """The results of one expert, which all tokens want."""
    ids_TK = torch.zeros(len(x_TH), 1, dtype=torch.int64)
    work = Work.of(len(x_TH), 1, layout, CPU)
    work.h_PW.fill_(float("nan"))
    numbers_E = torch.zeros(1, dtype=torch.int32)
    sort(ids_TK, work, numbers_E, torch.zeros_like(numbers_E), 1, TILES.rows)
    products = Products(block, stored_N[None], layout)
    products.run(products.arranged(x_TH), 1, work, TILES, 0, -(-len(x_TH) // TILES.rows))
    return work.y_PH


def is_close(found: Tensor, expected: Tensor) -> bool:
    """To rounding; what is not finite is close to nothing."""
    scale = float(expected.float().std())
    return torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2 * scale)


@pytest.mark.parametrize("columns", [8, 16, 24, 64, 128, 192, 0])
def test_scales_of_any_number_of_columns_are_those_of_their_words(columns: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(768, 384)
    specs = specs_of(layout)
    coding = coding_of(specs, lambda n, k: Int4Group(columns=columns or k, zeros=columns == 64))
    block = ExpertBlock(specs, coding=coding)
    stored_N = torch.zeros(block.stored_units, dtype=torch.int16)
    plain_N = torch.zeros(block.plain.units, dtype=torch.int16)
    stored, plain = block.stored_views(stored_N), block.plain.views(plain_N)
    for name, matrix in block.coding.items():
        parts = {part: stored[part_name(name, part)] for part in matrix.parts}
        draw_parts(parts)
        plain[name].copy_(matrix.encoding.decode(parts, BF16))
    x_TH = torch.randn(5, layout.hidden).to(BF16)
    found = computed(block, stored_N, layout, x_TH)
    expected = computed(block.plain, plain_N, layout, x_TH)
    assert is_close(found, expected)


@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("planted", [1, 12])
def test_every_patch_is_added_however_many_lie_together(planted: int, patches: int) -> None:
    """planted: in each chunk of 8,192 weights, of those that need a patch."""
    torch.manual_seed(0)
    layout = layout_of(1024, 64)
    specs = specs_of(layout)
    block = ExpertBlock(specs, patches)
    plain_N = torch.zeros(block.units, dtype=torch.int16)
    weights_N = plain_N[: block.matrix_units].view(BF16)
    weights_N.copy_(torch.rand(block.matrix_units) + 0.5)
    chunks_CN = weights_N.view(-1, 8192)
    for chunk in chunks_CN:
        chunk[torch.randperm(8192)[:planted]] = 2.0**40
    stored_N = block.store(plain_N)
    assert stored_N is not None
    x_TH = torch.randn(33, layout.hidden).to(BF16)
    found = computed(block, stored_N, layout, x_TH)
    expected = computed(block.plain, plain_N, layout, x_TH)
    assert is_close(found, expected)
