"""The C kernels sum in the written-down order, whatever the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cpu import CpuExperts, SumOrder, load_library
from runtime.cpu.shape import halving
from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from tests.helpers.cpu_experts import (
    CHAINED,
    FINITE,
    IN_THREADS,
    NARROW,
    SPECIAL,
    Case,
    packed_case,
    shape_of,
)  # fmt: skip


def both(width: int, *encodings: Encoding) -> tuple[int, Encoding, Encoding]:
    """The width of experts, and the encodings of their matrices: one, or one of each."""
    return width, encodings[0], encodings[-1]


ENCODINGS: dict[str, tuple[int, Encoding, Encoding]] = {
    "mxfp4": (1440, MXFP4(), MXFP4()),
    "int4 by 32": (1440, Int4Group(columns=32), Int4Group(columns=48)),
    "int4 by 128, zeros": (
        1408,
        Int4Group(columns=128, zeros=True),
        Int4Group(columns=64, zeros=True),
    ),
    "int4 in float16": both(1440, Int4Group(columns=32, scale=torch.float16)),
    "int4 by rows": both(1440, *(Int4Group(columns=n, scale=torch.float32) for n in (1440, 384))),
    "fp8 in blocks": both(1440, FP8Block(rows=32, columns=128)),
    "fp8 by rows": both(1408, FP8Block(columns=1 << 40, scale=torch.bfloat16)),
    "fp8 by powers of two": both(1440, FP8Block(columns=32, scale=torch.uint8)),
    "nvfp4": (1440, NVFP4(rows=32), NVFP4(rows=16)),
    "nvfp4 that divides": (1440, NVFP4(rows=32, divides=True), NVFP4(rows=16, divides=True)),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def compare(case: Case, x_H: Tensor, least: float = 0.9) -> None:
    """C, with the help of two threads, gives the reference's bits; NaN where it has NaN.

    least: share of the outputs that must be finite, or there is little to compare.
    """
    library = load_library(case.shape)
    assert not isinstance(library, str), library
    blocks, ids = case.blocks(2), [1]
    with CpuExperts(library, case.shape, case.table(blocks), 2, cores=(-1, -1)) as service:
        answer_KH = service.ask(0, ids, x_H).clone().numpy()
    expected_KH = np.stack([case.expected(blocks[expert], x_H) for expert in ids])
    np.testing.assert_array_equal(np.isnan(answer_KH), np.isnan(expected_KH))
    kept_KH = ~np.isnan(expected_KH)
    assert np.isfinite(expected_KH).mean() >= least
    np.testing.assert_array_equal(
        answer_KH[kept_KH].view(np.int32), expected_KH[kept_KH].view(np.int32)
    )


def compare_all(case: Case) -> None:
    """With a usual vector, tiny and large ones, one with zeros and subnormals, and one of +-1e30,
    of which little remains finite.
    """
    usual = torch.randn(case.shape.hidden).bfloat16()
    compare(case, usual)
    compare(case, (usual * 1e-37).bfloat16())
    compare(case, (usual * 1e7).bfloat16())
    compare(case, case.sprinkled(usual.clone(), 0.02, FINITE[:-2]))
    compare(case, case.sprinkled(usual.clone(), 0.02, FINITE[-2:]), least=0)


@pytest.mark.parametrize(
    "rest", [{}, {"alternating": True, "has_bias": True}], ids=("plain", "biased")
)
@pytest.mark.parametrize(
    "activation", ["silu", "gelu_tanh", "relu", "clamped_swiglu", "bounded_silu"]
)
def test_plain_experts(activation: str, rest: dict[str, bool]) -> None:
    up = SumOrder(columns=128, steps=IN_THREADS)
    down = SumOrder(columns=64, steps=halving(64))
    given: dict[str, Any] = {"activation": activation, "bounds": (0.5, 2.0)} | rest
    case = Case(shape_of(360, 88, up, down, **given))
    compare_all(case)


def test_lanes_summed_in_one_chain() -> None:
    orders = SumOrder(columns=1024, steps=CHAINED), SumOrder(columns=32, steps=NARROW)
    case = Case(shape_of(2880, 72, *orders))
    compare_all(case)


@pytest.mark.parametrize("special", [(), FINITE[:-2]], ids=("usual", "extreme"))
@pytest.mark.parametrize(
    ("hidden", "width", "rest"),
    [(2048, 256, {}), (2880, 72, {"alternating": True, "has_bias": True, "activation": "relu"})],
)
def test_packed_experts(
    hidden: int, width: int, rest: dict[str, bool], special: tuple[int, ...]
) -> None:
    case = packed_case(hidden, width, special, patches=64, **rest)
    compare_all(case)


def test_packed_experts_with_many_patches_in_a_row() -> None:
    case = packed_case(2048, 256, patches=64)
    case.outliers = {500 + i: 0x4380 + i for i in range(50)}
    compare(case, torch.randn(case.shape.hidden).bfloat16())


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_infinities_and_nan_stay_in_their_rows(name: str) -> None:
    orders = SumOrder(columns=128, steps=IN_THREADS), SumOrder(columns=64, steps=halving(64))
    case = Case(shape_of(360, 88, *orders)) if name == "plain" else packed_case(2048, 256)
    start, width = case.block.fields["down_proj"].start, case.shape.width
    special = enumerate([0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
    case.outliers = {start + (9 * i + 3) * width + 7 * i: bits for i, bits in special}
    compare(case, torch.randn(case.shape.hidden).bfloat16())


@pytest.mark.parametrize("name", ENCODINGS)
def test_coded_experts(name: str) -> None:
    hidden, *encodings = ENCODINGS[name]
    orders = SumOrder(columns=1024, steps=IN_THREADS), SumOrder(columns=256, steps=NARROW)
    case = Case(shape_of(hidden, 384, *orders, encodings=tuple(encodings)))
    compare_all(case)


@pytest.mark.parametrize(
    "name", ["mxfp4", "fp8 in blocks", "fp8 by powers of two", "int4 by 32", "nvfp4"]
)
def test_coded_experts_of_any_bits(name: str) -> None:
    """Every code, and scales of any size beside usual ones: subnormal, huge, some of them NaN."""
    hidden, *encodings = ENCODINGS[name]
    orders = SumOrder(columns=1024, steps=IN_THREADS), SumOrder(columns=256, steps=NARROW)
    case = Case(shape_of(hidden, 384, *orders, encodings=tuple(encodings)), SPECIAL)
    x_H = torch.randn(hidden).bfloat16()
    compare(case, x_H, least=0)
    compare(case, (x_H * 1e-37).bfloat16(), least=0)
