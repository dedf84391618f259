"""Batches of documents of similar length.

Documents are taken in windows. A window is sorted by length and cut into batches, so that little of
a batch is padding. Windows and batches depend on the documents alone: a resumed trace has the same
batches as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trace.sources import Prompt

WINDOW_BATCHES = 16
"""Full batches in a window. More of them need less padding, and hold more results in memory."""


def windows(prompts: Iterable[Prompt], num_tokens: int) -> Iterator[list[Prompt]]:
    """Consecutive documents in groups of at least `num_tokens` tokens; the last may have fewer."""
    window: list[Prompt] = []
    total = 0
    for prompt in prompts:
        window.append(prompt)
        total += len(prompt.ids)
        if total >= num_tokens:
            yield window
            window, total = [], 0
    if window:
        yield window


def batches(
    window: Sequence[Prompt], num_tokens: int, *, answer: int = 0
) -> Iterator[list[Prompt]]:
    """Cut a window, longest documents first, into batches of at most `num_tokens` tokens.

    Padding and the `answer` tokens to generate count. A batch has at least one document.
    """
    rest = sorted(window, key=lambda prompt: -len(prompt.ids))
    while rest:
        rows = max(1, num_tokens // (len(rest[0].ids) + answer))
        yield rest[:rows]
        rest = rest[rows:]


def padded(batch: Sequence[Prompt], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [B, T], padded on one side."""
    width = max(len(prompt.ids) for prompt in batch)
    ids_BT = torch.full((len(batch), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(batch):
        length = len(prompt.ids)
        span = slice(width - length, width) if left else slice(0, length)
        ids_BT[row, span] = torch.tensor(prompt.ids)
        mask_BT[row, span] = 1
    return ids_BT, mask_BT
