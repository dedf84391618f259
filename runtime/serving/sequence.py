"""A request in flight."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from torch import Tensor

from routing.predictor_file.driver import Past
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
        return self.row >= 0 and self.num_generated > 0 and self.num_pending == 1

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

    def accept(self, greedy: int, logits_V: Tensor) -> Finish | None:
        """Choose the next token; returns how the request ends, if it does."""
        if self._prompt_scores is not None and self.num_generated == 0:
            self._prompt_scores.check()
        if self.request.max_tokens == 0:
            return "length"
        token_id = self._sampler.choose(greedy, logits_V)
        if self.num_generated == 0:
            self.first_token = time.perf_counter()
        self.token_ids.append(token_id)
        if self.request.logprobs is not None:
            self._logprobs.append(logprob_of(token_id, logits_V, self.request.logprobs))
        finish = self._add_text(token_id)
        if finish is None and self.num_generated == self.request.max_tokens:
            finish = "length"
        return finish

    def _add_text(self, token_id: int) -> Finish | None:
        by_token = token_id in self._ends.token_ids
        ended = by_token or (self._grammar is not None and self._grammar.ended)
        may_stop = self.num_generated > self.request.min_tokens
        piece = "" if self._hides(token_id) else self._text.push(token_id, may_stop=may_stop)
        if ended or self.num_generated == self.request.max_tokens:
            piece += self._text.finish(may_stop=may_stop)
        if self.request.on_token is not None:
            logprob = self._logprobs[-1] if self._logprobs else None
            self.request.on_token(Delta(self.request.id, token_id, piece, logprob))
        return "stop" if ended or self._text.stopped else None

    def _hides(self, token_id: int) -> bool:
        """Whether a token ends the request without being part of its text."""
        shown = self.request.include_stop_str_in_output and token_id in self._ends.told_ids
        return token_id in self._ends.token_ids and not shown

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
