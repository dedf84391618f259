"""The attention kernels, interpreted, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from runtime.cuda.kernels import attention as kernels
from runtime.cuda.kernels.attention import Tile, attend
from runtime.cuda.kernels.new_tokens import write
from tests.helpers import interpreter

interpreter.mend()
CONTEXT = 150
EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""The share that a head's result may be off by: bfloat16 has 8 bits."""


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    shared=st.sampled_from([1, 3]),
    width=st.sampled_from([8, 12]),
    value_width=st.sampled_from([8, 5]),
    window=st.sampled_from([None, 1, 5, 70, 200]),
    has_sinks=st.booleans(),
    softcap=st.sampled_from([None, 0.8]),
    is_padded=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    positions=st.lists(st.integers(0, CONTEXT - 1), min_size=1, max_size=3),
)
def test_a_token_attends_to_its_own_row_up_to_itself(
    groups: int, shared: int, width: int, value_width: int, window: int | None, has_sinks: bool,
    softcap: float | None, is_padded: bool, dtype: torch.dtype, positions: list[int],
) -> None:  # fmt: skip
    random = torch.Generator().manual_seed(groups + 2 * width)
    heads, rows_B = groups * shared, torch.arange(len(positions)).flip(0) + 1

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    keys, values = (drawn(5, groups, CONTEXT, size) for size in (width, value_width))
    query, sinks = drawn(len(positions), heads, width), drawn(heads) if has_sinks else None
    real = torch.rand(5, CONTEXT, generator=random) < 0.4
    real[:, :66] = False  # all of the first block
    real[rows_B, torch.tensor(positions)] = True
    ours = attend(
        query, keys, values, rows_B, torch.tensor(positions), scale=0.3, window=window,
        sinks_H=sinks, softcap=softcap, real_RC=real if is_padded else None,
    )  # fmt: skip
    for token, (row, position) in enumerate(zip(rows_B.tolist(), positions, strict=True)):
        seen = torch.arange(max(position + 1 - (window or 200), 0), position + 1)
        seen = seen[real[row, seen]] if is_padded else seen
        one = [tensor[row][:, seen].repeat_interleave(shared, 0) for tensor in (keys, values)]
        theirs = reference(query[token], one[0], one[1], sinks, softcap)
        torch.testing.assert_close(
            ours[token].float(), theirs, rtol=EXACT[dtype], atol=EXACT[dtype]
        )


def reference(
    query_HD: Tensor, key_HCD: Tensor, value_HCV: Tensor, sinks_H: Any, softcap: float | None
) -> Tensor:
    scores_HC = torch.einsum("hd,hcd->hc", query_HD.float(), key_HCD.float()) * 0.3
    if softcap is not None:
        scores_HC = softcap * torch.tanh(scores_HC / softcap)
    if sinks_H is not None:
        scores_HC = torch.cat([scores_HC, sinks_H.float()[:, None]], 1)
    shares_HC = scores_HC.softmax(-1)[:, : key_HCD.shape[1]]
    return torch.einsum("hc,hcv->hv", shares_HC, value_HCV.float())


def test_what_lies_beyond_a_row_is_never_read() -> None:
    keys, values = torch.full((2, 2, 1, 9, 4), float("nan"))
    keys[1, 0, :3], values[1, 0, :3] = 1.0, 2.0
    out = attend(torch.ones(1, 1, 4), keys, values, torch.tensor([1]), torch.tensor([2]), scale=1.0)
    assert torch.equal(out, torch.full((1, 1, 4), 2.0))


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("window", [None, 80])
def test_bits_depend_on_nothing_but_the_tokens_own_row(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on other tokens, nor on the cache's size, nor on how many programs run."""
    keys, values = torch.randn(2, 3, 2, 200, 8).to(dtype)
    query, positions = torch.randn(3, 4, 8).to(dtype), torch.tensor([199, 70, 131])
    rows = torch.tensor([2, 0, 1])
    together = attend(query, keys, values, rows, positions, 0.4, window)
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    keys, values = (torch.cat([tensor, torch.randn_like(tensor)], 2) for tensor in (keys, values))
    for token in range(3):
        one = slice(token, token + 1)
        alone = attend(query[one], keys, values, rows[one], positions[one], 0.4, window)
        assert torch.equal(alone[0], together[token])


def test_heads_and_positions_may_lie_apart_in_memory() -> None:
    """As keys that are expanded from latent ones, and queries before they are turned."""
    states = torch.randn(2, 40, 3, 8 + 6)
    keys, values = (one.transpose(1, 2) for one in states.split([8, 6], -1))
    query, rows, positions = torch.randn(3, 2, 8).transpose(0, 1), *torch.tensor([[1, 0], [39, 20]])
    apart = attend(query, keys, values, rows, positions, scale=0.3)
    query, keys, values = (tensor.contiguous() for tensor in (query, keys, values))
    assert torch.equal(apart, attend(query, keys, values, rows, positions, scale=0.3))


def test_new_keys_and_values_go_to_their_rows_and_positions() -> None:
    keys, values = (torch.zeros(4, 2, 10, size) for size in (8, 5))
    new_keys, new_values = (torch.randn(2, 3, size).transpose(0, 1) for size in (8, 5))
    rows, positions = torch.tensor([3, 0, 1]), torch.tensor([9, 0, 4])
    write(new_keys, new_values, keys, values, rows, positions)
    for cache, new in ((keys, new_keys), (values, new_values)):
        expected = torch.zeros_like(cache)
        expected[rows, :, positions] = new
        assert torch.equal(cache, expected)


@pytest.mark.parametrize(
    ("width", "keys"), [(8, 64), (64, 64), (128, 64), (192, 32), (256, 32), (512, 16), (576, 16)]
)
def test_blocks_are_shorter_where_heads_are_wide(width: int, keys: int) -> None:
    assert Tile.of(8, width, torch.bfloat16) == (keys, 8, 16, 4)
    assert Tile.of(8, width, torch.float32) == (keys, 1, 1, 4)
    assert Tile.of(1, width, torch.bfloat16) == (keys, 1, 1, 2)
