"""The converted model beside the original on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


class _Sums:
    """Losses, divergences and agreements of one model, summed over tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, theirs_TV: Tensor, ours_TV: Tensor, following_T: Tensor) -> None:
        """Add a window. Log-probabilities of the original and of this model, and the true text."""
        self.tokens += len(following_T)
        one = [
            -theirs_TV.gather(-1, following_T[:, None]).sum(),
            -ours_TV.gather(-1, following_T[:, None]).sum(),
            (theirs_TV.exp() * (theirs_TV - ours_TV)).sum(),
            (theirs_TV.argmax(-1) == ours_TV.argmax(-1)).sum(),
        ]
        self._sums += torch.stack([value.double().cpu() for value in one])

    def quality(self) -> Quality:
        original_loss, loss, divergence, agreement = (self._sums / self.tokens).tolist()
        perplexities = math.exp(original_loss), math.exp(loss)
        return Quality(self.tokens, *perplexities, divergence, agreement)


@torch.inference_mode()
def compare(original: Any, converted: Sequence[Any], windows: Iterable[Tensor]) -> list[Quality]:
    """Run the models over windows, int64 [1, T]. Logits count as float32."""
    sums = [_Sums() for _ in converted]
    for window in windows:
        theirs_TV = _log_probabilities(original, window)
        following_T = window[0, 1:].to(theirs_TV.device)
        for model, of_model in zip(converted, sums, strict=True):
            of_model.add(theirs_TV, _log_probabilities(model, window), following_T)
    return [one.quality() for one in sums]


def _log_probabilities(model: Any, window: Tensor) -> Tensor:
    """Float32 [T - 1, V], of the tokens after the first."""
    logits = model(input_ids=window.to(model.device), use_cache=False).logits
    return torch.log_softmax(logits[0, :-1].float(), dim=-1)
