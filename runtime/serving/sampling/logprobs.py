"""Log-probabilities of tokens in the model's own distribution, before any rule of sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from runtime.engine.next_tokens import NOT_FINITE
from runtime.serving.request import Logprob

TOGETHER = 32
"""Rows of logits whose float32 copies are in memory at the same time."""


def logprob_of(token_id: int, logits_V: Tensor, count: int) -> Logprob:
    """The log-probability of a token, and the `count` highest. logits_V: float [V]."""
    return next(logprobs_of([token_id], logits_V[None], count))


def logprobs_of(token_ids: Sequence[int], logits_TV: Tensor, count: int) -> Iterator[Logprob]:
    """The log-probability of each of T tokens in its own row, and the `count` highest there.

    A token that is none of these comes after them, where any are asked for.
    """
    chosen_T = torch.tensor(token_ids, device=logits_TV.device)
    for ids_t, logits_tV in zip(chosen_T.split(TOGETHER), logits_TV.split(TOGETHER), strict=True):
        logprobs_tV = logits_tV.float().log_softmax(-1)
        values, ids = logprobs_tV.topk(min(count, logprobs_tV.shape[-1]))
        own = logprobs_tV.gather(-1, ids_t[:, None])[:, 0]
        for token_id, logprob, top_ids, top_values in zip(
            ids_t.tolist(), own.tolist(), ids.tolist(), values.tolist(), strict=True
        ):
            top = list(zip(top_ids, top_values, strict=True))
            if top and token_id not in top_ids:
                top.append((token_id, logprob))
            yield Logprob(token_id, logprob, tuple(top))


class PromptScores:
    """The log-probabilities of a prompt's tokens, as its chunks run."""

    def __init__(self, prompt_ids: Sequence[int], count: int) -> None:
        self._prompt_ids, self._count = prompt_ids, count
        self._logprobs: list[Logprob | None] = [None]

    @property
    def so_far(self) -> tuple[Logprob | None, ...]:
        """One for each token; None for the first, which nothing comes before."""
        return tuple(self._logprobs)

    def add(self, start: int, logits_TV: Tensor) -> None:
        """Take the logits after T tokens of the prompt, of which `start` come before. A step that
        is run again says the same again.
        """
        del self._logprobs[start + 1 :]
        assert len(self._logprobs) == start + 1, "chunks of a prompt run in order"
        following = self._prompt_ids[start + 1 : start + 1 + len(logits_TV)]
        if following:
            self._logprobs += logprobs_of(following, logits_TV[: len(following)], self._count)

    def check(self) -> None:
        """Raise FloatingPointError for a model that has no probabilities."""
        if any(one is not None and math.isnan(one.logprob) for one in self._logprobs):
            raise FloatingPointError(NOT_FINITE)
        assert len(self._logprobs) == len(self._prompt_ids), "the whole prompt has run"
