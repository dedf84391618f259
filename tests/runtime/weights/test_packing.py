"""Packing loses no bit, whatever the bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.memory.expert_block import CHUNK
from runtime.weights.packed import packing
from runtime.weights.packed.packing import PATCHES, pack, packed_bytes, unpack

SMALL = 1024
"""Weights of a chunk, where no kernel reads it."""
ROOM = PATCHES[0]
SPECIAL = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x0001, 0x807F, 0x0080, 0x7F7F]
"""Zeros, infinities, NaNs, subnormals, the smallest and the largest number."""


def as_units(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16))


def normal(*shape: int, scale: float = 0.02) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16().view(torch.int16)


def through(matrices: list[Tensor], patches: int = ROOM) -> Tensor:
    """Packed and unpacked again, int16 [D, C]."""
    chunk = matrices[0].shape[1]
    packed = pack(matrices, patches)
    assert packed is not None
    assert packed.nbytes == packed_bytes(sum(map(len, matrices)), chunk, patches)
    return unpack(packed, chunk, patches)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Chunks of weights of 15 neighbouring exponents, and up to 4 of any bits in each."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_chunks, first = draw(st.integers(1, 3)), draw(st.integers(1, 128))
    exponents_DC = random.integers(first, first + 15, (num_chunks, SMALL))
    bits_DC = random.integers(2, size=(num_chunks, SMALL)) << 15 | exponents_DC << 7
    bits_DC |= random.integers(128, size=(num_chunks, SMALL))
    for bits_C in bits_DC:
        places = draw(st.lists(st.integers(0, SMALL - 1), max_size=4))
        for place in places:
            bits_C[place] = draw(st.sampled_from(SPECIAL) | st.integers(0, 0xFFFF))
    return as_units(bits_DC)


@settings(max_examples=60, deadline=None)
@given(st.lists(weights(), min_size=1, max_size=2))
def test_what_was_packed_comes_back_bit_for_bit(matrices: list[Tensor]) -> None:
    assert torch.equal(through(matrices), torch.cat(matrices))


@pytest.mark.parametrize("seed", [0, 1])
def test_every_bit_pattern_comes_back(seed: int) -> None:
    bits = np.random.default_rng(seed).permutation(1 << 16).reshape(-1, SMALL)
    chunks_DC = as_units(bits)
    assert torch.equal(through([chunks_DC], patches=SMALL), chunks_DC)


@pytest.mark.parametrize("bits", SPECIAL, ids=hex)
def test_matrices_of_one_number_come_back(bits: int) -> None:
    chunks_DC = as_units(np.full((2, SMALL), bits))
    assert torch.equal(through([chunks_DC], patches=SMALL + 1), chunks_DC)


def test_zeros_need_no_patch() -> None:
    chunks_DC = as_units(np.full((3, SMALL), 0x3F80))
    chunks_DC[:, ::2] = as_units(np.array([0x8000]))
    chunks_DC[1] = 0
    assert torch.equal(through([chunks_DC], patches=1), chunks_DC)


def test_more_chunks_than_are_packed_at_once_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PART", 2)
    chunks_DC = normal(5, SMALL)
    chunks_DC[4, 7] = 0x7FC1
    assert torch.equal(through([chunks_DC]), chunks_DC)


def test_a_quarter_of_the_bytes_is_saved_but_for_the_room_for_patches() -> None:
    assert packed_bytes(4, CHUNK, ROOM) == 4 * (CHUNK * 3 // 2 + 4 * ROOM)
    assert packed_bytes(1, CHUNK, ROOM) < 0.755 * 2 * CHUNK


@pytest.mark.parametrize(("num_odd", "packs"), [(ROOM - 1, True), (ROOM, False)])
def test_a_chunk_without_room_for_its_patches_is_not_packed(num_odd: int, packs: bool) -> None:
    chunks_DC = as_units(np.full((2, SMALL), 0x3F80))
    chunks_DC[1, :num_odd] = 0x7F7F
    assert (pack([chunks_DC], ROOM) is not None) == packs
