"""The converted model beside the original on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Quality(NamedTuple):
    """What a conversion costs, over all tokens of a text but the first of each window."""

    tokens: int
    original_perplexity: float
    perplexity: float
    divergence: float
    """Mean Kullback-Leibler divergence of the converted model's next-token distribution from the
    original's, in nats."""
    agreement: float
    """Share of tokens at which both models find the same next token the likeliest, both given the
    true text."""

    @property
    def change(self) -> float:
        """Relative change of the perplexity."""
        return self.perplexity / self.original_perplexity - 1


@torch.inference_mode()
def compare(original: Any, converted: Any, windows: Iterable[Tensor]) -> Quality:
    """Run both models over windows, int64 [1, T]. Logits count as float32."""
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for window in windows:
        theirs, ours = (_log_probabilities(model, window) for model in (original, converted))
        following = window[0, 1:, None].to(theirs.device)
        one = [
            -theirs.gather(-1, following).sum(),
            -ours.gather(-1, following).sum(),
            (theirs.exp() * (theirs - ours)).sum(),
            (theirs.argmax(-1) == ours.argmax(-1)).sum(),
        ]
        sums += torch.stack([value.double().cpu() for value in one])
        tokens += following.numel()
    original_loss, loss, divergence, agreement = (sums / tokens).tolist()
    return Quality(tokens, math.exp(original_loss), math.exp(loss), divergence, agreement)


def _log_probabilities(model: Any, window: Tensor) -> Tensor:
    """Float32 [T - 1, V], of the tokens after the first."""
    logits = model(input_ids=window.to(model.device), use_cache=False).logits
    return torch.log_softmax(logits[0, :-1].float(), dim=-1)
