"""Packing loses no bit, whatever the bits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda import packing
from runtime.cuda.host import runs
from runtime.cuda.packing import MOST_PATCHES, Packed, pack, unpack
from runtime.cuda.transfer_kernels import LANDINGS, land

CHUNK = 1024
SPECIAL = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x0001, 0x807F, 0x0080, 0x7F7F]
"""Zeros, infinities, NaNs, subnormals, the smallest and the largest number."""


def as_units(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16))


def normal(num_chunks: int, chunk: int = CHUNK, scale: float = 0.02) -> Tensor:
    return (torch.randn(num_chunks, chunk) * scale).bfloat16().view(torch.int16)


def packed(chunks_DC: Tensor) -> Packed:
    made = pack(chunks_DC)
    assert made is not None
    return made


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Chunks of weights of 15 neighbouring exponents, and up to 4 of any bits in each."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_chunks = draw(st.integers(1, 3))
    first_D1 = np.array(
        draw(st.lists(st.integers(0, 241), min_size=num_chunks, max_size=num_chunks))
    )[:, None]
    exponents_DC = random.integers(first_D1, first_D1 + 15, (num_chunks, CHUNK))
    bits_DC = random.integers(2, size=(num_chunks, CHUNK)) << 15 | exponents_DC << 7
    bits_DC |= random.integers(128, size=(num_chunks, CHUNK))
    for bits_C in bits_DC:
        places = draw(st.lists(st.integers(0, CHUNK - 1), max_size=4))
        for place in places:
            bits_C[place] = draw(st.sampled_from(SPECIAL) | st.integers(0, 0xFFFF))
    return as_units(bits_DC)


@settings(max_examples=60, deadline=None)
@given(weights())
def test_what_was_packed_comes_back_bit_for_bit(chunks_DC: Tensor) -> None:
    assert torch.equal(unpack(packed(chunks_DC)), chunks_DC)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_bit_pattern_comes_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_PATCHES", 1.0)
    bits = np.random.default_rng(seed).permutation(1 << 16).reshape(-1, CHUNK)
    chunks_DC = as_units(bits)
    assert torch.equal(unpack(packed(chunks_DC)), chunks_DC)


@pytest.mark.parametrize("bits", SPECIAL, ids=hex)
def test_chunks_of_one_number_come_back(bits: int) -> None:
    chunks_DC = as_units(np.full((2, CHUNK), bits))
    assert torch.equal(unpack(packed(chunks_DC)), chunks_DC)


def test_zeros_need_no_patch() -> None:
    chunks_DC = normal(3)
    chunks_DC[:, ::2] = as_units(np.array([0x8000]))
    chunks_DC[1] = 0
    made = packed(chunks_DC)
    assert len(made.bits_P) <= MOST_PATCHES * chunks_DC.numel()
    assert int(made.counts_D[1]) == 0
    assert torch.equal(unpack(made), chunks_DC)


def test_more_chunks_than_are_packed_at_once_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PART", 2)
    chunks_DC = normal(5)
    chunks_DC[4, 7] = 0x7FC1
    made = packed(chunks_DC)
    assert torch.equal(unpack(made), chunks_DC)


def test_a_quarter_of_the_bytes_is_saved() -> None:
    made = packed(normal(4))
    assert made.low_DC.nbytes + made.high_DC.nbytes == 4 * CHUNK * 3 // 2


@pytest.mark.parametrize(("num_odd", "packs"), [(4, True), (5, False)])
def test_weights_that_need_too_many_patches_are_not_packed(num_odd: int, packs: bool) -> None:
    chunks_DC = as_units(np.full((1, CHUNK), 0x3F80))
    chunks_DC[0, :num_odd] = 0x7F7F
    assert num_odd - 1 < MOST_PATCHES * CHUNK < 5
    assert (pack(chunks_DC) is not None) == packs


def test_numbers_of_every_exponent_are_not_packed() -> None:
    random = np.random.default_rng(0).integers(1 << 16, size=(4, CHUNK))
    assert pack(as_units(random)) is None


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("count", [1, 3, LANDINGS])
def test_a_kernel_unpacks_records_into_their_slots(
    share: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`share` of the weights are of any bits: more patches than are written at a time."""
    monkeypatch.setattr(packing, "MOST_PATCHES", 1.0)
    num_experts, num_chunks, chunk = 5, 2, 256
    records_DC = normal(num_experts * num_chunks, chunk)
    odd_DC = torch.rand(records_DC.shape) < share
    records_DC[odd_DC] = torch.randint(-(2**15), 2**15, (int(odd_DC.sum()),)).to(torch.int16)
    made = packed(records_DC)
    assert share == 0 or int(made.counts_D.max()) > 32
    starts = torch.nn.functional.pad(made.counts_D.cumsum(0), (1, 0)).to(torch.int32)
    records_EN = records_DC.view(num_experts, -1)
    low_EN, high_EN = made.low_DC.view(num_experts, -1), made.high_DC.view(num_experts, -1)
    slots_SN = torch.full((6, num_chunks * chunk), -1, dtype=torch.int16)
    experts, slots, padding = [2, 0, 4, 1][:count], [0, 3, 5, 2][:count], [0] * (LANDINGS - count)
    land[(num_chunks, count)](
        slots_SN, low_EN[experts], high_EN[experts], made.base_D, starts, made.units_P,
        made.bits_P, *experts, *padding, *slots, *padding,
        UNITS=num_chunks * chunk, CHUNK=chunk,
    )  # fmt: skip
    assert torch.equal(slots_SN[slots], records_EN[experts])
    others = [slot for slot in range(6) if slot not in slots]
    assert (slots_SN[others] == -1).all()


@given(st.lists(st.integers(0, 9), unique=True))
def test_runs_are_as_few_as_can_be_and_say_the_numbers_in_order(numbers: list[int]) -> None:
    found = runs(numbers)
    assert [first + i for first, count in found for i in range(count)] == numbers
    assert all(a + n != b for (a, n), (b, _) in pairwise(found))
