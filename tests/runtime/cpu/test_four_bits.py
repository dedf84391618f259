"""Numbers of four bits are summed in the written-down order with vectors of every width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from runtime.cpu import SumOrder, library, load_library
from tests.helpers.cpu_comparison import ENCODINGS, compare, compare_all
from tests.helpers.cpu_experts import IN_THREADS, NARROW, SPECIAL, Case, shape_of

MODELS = Path(__file__).parents[2] / "helpers" / "emulated_avx512.h"
NO_PAIRS, PAIRS, FUSED_PAIRS = 0, 1, 2
"""Processors: without a product of pairs; with one; with one that rounds a pair only once."""


@pytest.fixture(autouse=True)
def compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def emulate(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """Compile for a processor with the widest vectors, whose instructions are modelled in C."""
    options = tuple("-O1" if option == "-O3" else option for option in library.OPTIONS)
    models = ("-Wno-psabi", f"-DEMULATED_PAIRS={pairs}", "-include", str(MODELS))
    monkeypatch.setattr(library, "OPTIONS", (*options, *models))


def case_of(name: str, special: tuple[int, ...] = ()) -> Case:
    hidden, *encodings = ENCODINGS[name]
    orders = SumOrder(columns=1024, steps=IN_THREADS), SumOrder(columns=256, steps=NARROW)
    return Case(shape_of(hidden, 384, *orders, encodings=tuple(encodings)), special)


def compare_sizes(case: Case) -> None:
    """Vectors of the smallest and the largest numbers that are multiplied in pairs, of numbers of
    all sizes between, and of numbers just beyond.
    """
    usual = torch.randn(case.shape.hidden)
    for power in (-72, -70, -60, 60, 63, 64):
        case.exponents = (127 - power - 8, 127 - power - 4)
        vector = (usual.sign() * 2.0**power * (1 + usual.abs() % 0.99)).bfloat16()
        compare(case, vector, least=0.9 if power < 64 else 0)
    case.exponents = (118, 124)
    compare(case, (usual * torch.randint(-60, 12, usual.shape).exp2()).bfloat16())


def test_mxfp4_of_any_size() -> None:
    compare_sizes(case_of("mxfp4"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "pairs", [NO_PAIRS, PAIRS, FUSED_PAIRS], ids=("no pairs", "pairs", "fused pairs")
)
def test_mxfp4_in_the_widest_vectors(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, pairs)
    compare_all(case_of("mxfp4"))
    compare_sizes(case_of("mxfp4"))
    compare(case_of("mxfp4", SPECIAL), torch.randn(1440).bfloat16(), least=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["int4 by 32", "nvfp4", "fp8 in blocks"])
def test_other_codes_in_the_widest_vectors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, PAIRS)
    compare_all(case_of(name))
