"""trace.batches: batches of documents of similar length."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trace.batches import batches, padded, windows
from trace.sources import Prompt

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths, st.integers(1, 120), st.integers(0, 9))
def test_batches_hold_every_document_once_within_their_budget(
    lengths: list[int], num_tokens: int, answer: int
) -> None:
    prompts = [Prompt(n, [n] * length, "x", 0) for n, length in enumerate(lengths)]
    split = list(windows(prompts, num_tokens))
    assert [prompt for window in split for prompt in window] == prompts
    for window in split:
        cut = list(batches(window, num_tokens, answer=answer))
        assert sorted(p.number for batch in cut for p in batch) == [p.number for p in window]
        for batch in cut:
            width = max(len(prompt.ids) for prompt in batch) + answer
            assert len(batch) == 1 or len(batch) * width <= num_tokens


@given(lengths, st.booleans())
def test_padding_is_masked_and_nothing_else_is(lengths: list[int], left: bool) -> None:
    prompts = [Prompt(n, [n + 1] * length, "x", 0) for n, length in enumerate(lengths)]
    ids_BT, mask_BT = padded(prompts, pad_id=0, left=left)
    assert torch.equal(ids_BT > 0, mask_BT > 0)
    for prompt, ids_T, mask_T in zip(prompts, ids_BT, mask_BT, strict=True):
        assert ids_T[mask_T > 0].tolist() == prompt.ids
        assert bool(mask_T[-1 if left else 0])
