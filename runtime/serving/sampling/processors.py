"""Logits processors that transformers has none of, or none for every value."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LogitsProcessor


class LogitBias(LogitsProcessor):
    """Adds to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(bias))
        self._added = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(-1, self._ids, self._added[None])


class CountPenalties(LogitsProcessor):
    """Presence and frequency penalties, over generated tokens alone.

    logit - frequency * count - presence * (count > 0), as OpenAI's API defines them.
    """

    def __init__(self, presence: float, frequency: float, num_prompt: int) -> None:
        self._presence, self._frequency, self._num_prompt = presence, frequency, num_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids, counts = input_ids[0, self._num_prompt :].unique(return_counts=True)
        scores = scores.clone()
        scores[0, ids] = scores[0, ids] - self._frequency * counts - self._presence
        return scores


class Temperature(LogitsProcessor):
    """Divides the distances to the highest score: a quotient of the scores themselves can overflow.

    In float64, for temperatures that are 0 in float32.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = scores.double() - scores.max(-1, keepdim=True).values.double()
        return (below / self._temperature).float()
