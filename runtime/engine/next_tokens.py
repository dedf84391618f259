"""The next tokens of a step: the likeliest ones, and the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOT_FINITE = "the model's logits are NaN: a weight or an activation is not finite"


class NextTokens(NamedTuple):
    """Of N sequences."""

    greedy_N: list[int]
    """The most likely token; -1 where a logit is NaN."""
    logits_NV: Tensor
    """On the model's device; good until the next step."""

    @classmethod
    def of(cls, logits_NV: Tensor) -> NextTokens:
        """Chosen where the logits are; waits for the device."""
        best_N = logits_NV.argmax(-1)
        is_nan_N = logits_NV.gather(-1, best_N[:, None])[:, 0].isnan()  # NaN is above all
        return cls(best_N.masked_fill(is_nan_N, -1).tolist(), logits_NV)

    def alone(self, number: int) -> NextTokens:
        """That of one sequence, good for ever."""
        return NextTokens([self.greedy_N[number]], self.logits_NV[number : number + 1].clone())

    @classmethod
    def joined(cls, parts: Sequence[NextTokens]) -> NextTokens:
        """One after the other."""
        greedy_N = [token for part in parts for token in part.greedy_N]
        return cls(greedy_N, torch.cat([part.logits_NV for part in parts]))
