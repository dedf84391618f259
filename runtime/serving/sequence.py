"""A request in flight."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from torch import Tensor

from routing.predictor_file.driver import Past
from runtime.engine.next_tokens import NextTokens
from runtime.prediction.sequence_forecaster import SequenceForecast
from runtime.serving.detokenizer import TextStream
from runtime.serving.request import Delta, Finish, Logprob, Request, Result
from runtime.serving.sampling.ends import Ends
from runtime.serving.sampling.grammar import Grammar
from runtime.serving.sampling.logprobs import PromptScores, logprob_of
from runtime.serving.sampling.sampler import Sampler

MOST_SCORED = 128
"""Prompt tokens of one sequence in a step where all their logits are read: these are large."""


class ServedSequence:
    """The state of one request: tokens, cache row, forecast, waiting so far."""

    def __init__(
        self,
        request: Request,
        prompt_ids: list[int],
        tokenizer: Any,
        number: int,
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        """eos_ids: the model's. Raises ValueError for a request that cannot be served."""
        self.request = request
        self.number = number
        """Place in the order of arrival."""
        self.token_ids = prompt_ids
        """Prompt and generated."""
        self.num_prompt = len(prompt_ids)
        self.num_cached = 0
        """Tokens whose keys and values are in the row."""
        self.row = -1
        """Row of the key/value cache; -1 while waiting."""
        self.overtaken = 0
        """Later requests that were admitted before this one."""
        self.num_waiting_at_arrival = 1
        """Requests waiting when this one arrived, itself and those that came with it included."""
        self.skipped = 0
        """Steps in a row that ran without this sequence."""
        self.routes: list[np.ndarray] = []
        """int64 [T, L, K] of the tokens that ran, step by step, where they are recorded."""
        self.predictor_past: Past | None = None
        self.forecast: SequenceForecast | None = None
        """The forecast for the pending tokens; None without a predictor."""
        self._ends = Ends.of(request, tokenizer, eos_ids)
        self._grammar = (
            None
            if request.json_schema is None
            else Grammar(request.json_schema, tokenizer, eos_ids)
        )
        self._sampler = Sampler(request, prompt_ids, self._ends.token_ids, self._grammar)
        self._text = TextStream(
            tokenizer, self._ends.texts, includes_stop=request.include_stop_str_in_output
        )
        self._logprobs: list[Logprob] = []
        self._prompt_scores = (
            None
            if request.prompt_logprobs is None
            else PromptScores(prompt_ids.copy(), request.prompt_logprobs)
        )
        self.arrived = time.perf_counter()
        self.first_token = math.nan

    @property
    def limit(self) -> int:
        """Tokens of the finished sequence at the most."""
        return self.num_prompt + self.request.max_tokens

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_ready(self) -> bool:
        """True when one token is pending: the sequence can join a decode step."""
        num_tokens = len(self.token_ids)
        return self.row >= 0 and num_tokens > self.num_prompt and num_tokens == self.num_cached + 1

    @property
    def num_pending(self) -> int:
        """Tokens still to run before the next can be chosen."""
        return len(self.token_ids) - self.num_cached

    def forget(self) -> None:
        """Keep the part of the forecast that admission reads; the rest is predicted again later."""
        if self.predictor_past is not None and self.forecast is not None:
            self.predictor_past, self.forecast = None, self.forecast.brief()

    @property
    def scores_prompt(self) -> bool:
        """True while the logits after every token of the prompt are needed."""
        return self._prompt_scores is not None and self.num_generated == 0

    def start_over(self) -> None:
        """Let all tokens run again: what the cache had of them cannot be gone on with."""
        self.num_cached, self.routes = 0, []

    def next_chunk(self, most: int) -> int:
        """Pending tokens to run in a step that has room for `most`."""
        return min(self.num_pending, most, *([MOST_SCORED] if self.scores_prompt else []))

    def score_prompt(self, logits_TV: Tensor) -> None:
        """Take the logits after the T tokens of the prompt that ran. logits_TV: float [T, V]."""
        assert self._prompt_scores is not None
        self._prompt_scores.add(self.num_cached, logits_TV)

    def accept(self, following: NextTokens, number: int) -> Finish | None:
        """Choose the next token, this sequence's being that `number`; returns how the request ends,
        if it does.
        """
        request, token_id = self.request, following.greedy_N[number]
        num_generated = len(self.token_ids) + 1 - self.num_prompt
        if self._prompt_scores is not None and num_generated == 1:
            self._prompt_scores.check()
        if request.max_tokens == 0:
            return "length"
        if token_id < 0 or not self._sampler.takes_likeliest:
            token_id = self._sampler.choose(token_id, following.logits_NV[number])
        if num_generated == 1:
            self.first_token = time.perf_counter()
        self.token_ids.append(token_id)
        if request.logprobs is not None:
            logits_V = following.logits_NV[number]
            self._logprobs.append(logprob_of(token_id, logits_V, request.logprobs))
        is_last = num_generated == request.max_tokens
        has_stopped = self._add_text(token_id, num_generated > request.min_tokens, is_last)
        return "stop" if has_stopped else "length" if is_last else None

    def _add_text(self, token_id: int, may_stop: bool, is_last: bool) -> bool:
        """Take the text of a token that was chosen; True where the request ends by it."""
        request, text, by_token = self.request, self._text, token_id in self._ends.token_ids
        ended = by_token or (self._grammar is not None and self._grammar.ended)
        shown = request.include_stop_str_in_output and token_id in self._ends.told_ids
        piece = "" if by_token and not shown else text.push(token_id, may_stop=may_stop)
        if ended or is_last:
            piece += text.finish(may_stop=may_stop)
        if request.on_token is not None:
            logprob = self._logprobs[-1] if self._logprobs else None
            request.on_token(Delta(request.id, token_id, piece, logprob))
        return ended or text.stopped

    def result(self, finish: Finish, error: str = "") -> Result:
        """The request's end, as the caller gets it."""
        return Result(
            id=self.request.id,
            text=self._text.text,
            token_ids=tuple(self.token_ids[self.num_prompt :]),
            num_prompt=self.num_prompt,
            finish=finish,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=() if self._prompt_scores is None else self._prompt_scores.so_far,
            error=error,
            arrived=self.arrived,
            first_token=self.first_token,
            finished=time.perf_counter(),
        )
