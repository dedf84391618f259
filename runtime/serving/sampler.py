"""The sampler: one request's next token, by its own settings and random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.engine.next_tokens import NOT_FINITE
from runtime.serving.request import Logprob, Request


class Sampler:
    """Chooses tokens for one request; never depends on what else the step ran."""

    def __init__(self, request: Request) -> None:
        self.greedy = request.temperature == 0.0
        self._random = torch.Generator()
        if request.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(request.seed % 2**63)
        self._warpers = LogitsProcessorList()
        if not self.greedy:
            self._warpers.append(TemperatureLogitsWarper(float(request.temperature)))
        if request.top_k:
            self._warpers.append(TopKLogitsWarper(int(request.top_k)))
        if request.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(float(request.top_p)))

    def choose(self, greedy: int, logits_V: Tensor) -> int:
        """A token id. greedy: the most likely, -1 for none. logits_V: float [V].

        Raises FloatingPointError when there is none.
        """
        if greedy < 0:
            raise FloatingPointError(NOT_FINITE)
        if self.greedy:
            return greedy
        seen: Any = torch.empty(1, 0, dtype=torch.int64)  # no warper looks at NaN
        scores_1V: Any = self._warpers(seen, logits_V[None].float().cpu())
        return int(torch.multinomial(scores_1V.softmax(-1)[0], 1, generator=self._random))


def logprob_of(token_id: int, logits_V: Tensor, count: int) -> Logprob:
    """The log-probability of a token, and the `count` highest. logits_V: float [V]."""
    logprobs_V = logits_V.float().log_softmax(-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    top = zip(ids.tolist(), values.tolist(), strict=True)
    return Logprob(token_id, float(logprobs_V[token_id]), tuple(top))
