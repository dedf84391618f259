"""The C kernels sum in the written-down order, whatever the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from runtime.cpu import SumOrder
from runtime.cpu.shape import halving
from tests.helpers.cpu_comparison import ENCODINGS, compare, compare_all
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


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
