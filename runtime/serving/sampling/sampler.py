"""The sampler: one request's next token, by its own settings and random numbers.

Rules in the order of vLLM: grammar, minimum of tokens, bias, penalties; then the likeliest token,
or temperature, min_p, top_k, top_p and a draw.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.engine.next_tokens import NOT_FINITE
from runtime.serving.request import Request
from runtime.serving.sampling.grammar import Grammar
from runtime.serving.sampling.processors import CountPenalties, LogitBias, Temperature

NO_TOKEN = "no token can follow: json_schema, min_tokens and the model's own -inf logits leave none"
TOO_LARGE = "logits are infinite: the model's own, or repetition_penalty makes them so"


class Sampler:
    """Chooses tokens for one request; never depends on what else the step ran."""

    def __init__(
        self,
        request: Request,
        prompt_ids: Sequence[int] = (),
        end_ids: Collection[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """prompt_ids: for the repetition penalty. end_ids: tokens that end the request."""
        self.greedy = request.temperature == 0.0
        self._random = torch.Generator()
        if request.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(request.seed % 2**63)
        self._grammar = grammar
        self._processors = _processors(request, len(prompt_ids), end_ids)
        self._warpers = LogitsProcessorList() if self.greedy else _warpers(request)
        self.takes_likeliest = self.greedy and grammar is None and not self._processors
        """Whether the most likely token is chosen, whatever the other logits are."""
        self._count = len(prompt_ids) if self._processors else 0
        room = request.max_tokens if self._processors else 0
        self._seen = torch.zeros(1, self._count + room, dtype=torch.int64)
        """Prompt and generated, as far as `_count`; where a processor looks at them."""
        self._seen[0, : self._count] = torch.tensor(prompt_ids[: self._count], dtype=torch.int64)

    def choose(self, greedy: int, logits_V: Tensor) -> int:
        """A token id. greedy: the most likely of the logits, -1 for none. logits_V: float [V].

        Raises FloatingPointError where the model has none, ValueError where the rules leave none.
        """
        if greedy < 0:
            raise FloatingPointError(NOT_FINITE)
        if self.takes_likeliest:
            return greedy
        token_id = self._choose(logits_V[None].float().cpu())
        if self._processors:
            self._seen[0, self._count] = token_id
            self._count += 1
        if self._grammar is not None:
            self._grammar.take(token_id)
        return token_id

    def _choose(self, scores_1V: Any) -> int:
        seen: Any = self._seen[:, : self._count]
        if self._grammar is not None:
            scores_1V = self._grammar(seen, scores_1V)
        scores_1V = self._processors(seen, scores_1V)
        best = float(scores_1V.max())
        if not math.isfinite(best):
            if best == -math.inf:
                raise ValueError(NO_TOKEN)
            raise (ValueError if self._processors else FloatingPointError)(TOO_LARGE)
        if self.greedy:
            return int(scores_1V.argmax())
        scores_1V = self._warpers(seen, scores_1V)
        return int(torch.multinomial(scores_1V.softmax(-1)[0], 1, generator=self._random))


def _processors(request: Request, num_prompt: int, end_ids: Collection[int]) -> LogitsProcessorList:
    """The rules that change which token is the likeliest."""
    found = LogitsProcessorList()
    if request.min_tokens and end_ids:
        found.append(
            MinNewTokensLengthLogitsProcessor(num_prompt, request.min_tokens, sorted(end_ids))
        )
    if request.logit_bias:
        found.append(LogitBias(request.logit_bias))
    if request.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(request.repetition_penalty))
    if request.presence_penalty or request.frequency_penalty:
        found.append(
            CountPenalties(request.presence_penalty, request.frequency_penalty, num_prompt)
        )
    return found


def _warpers(request: Request) -> LogitsProcessorList:
    """The rules of sampling."""
    found = LogitsProcessorList([Temperature(request.temperature)])
    if request.min_p:
        found.append(MinPLogitsWarper(request.min_p))
    if request.top_k:
        found.append(TopKLogitsWarper(request.top_k))
    if request.top_p < 1.0:
        found.append(TopPLogitsWarper(request.top_p))
    return found
