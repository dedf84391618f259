"""A request in flight."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from routing.predictor_file.driver import Past
from runtime.prediction.sequence_forecaster import SequenceForecast
from runtime.serving.detokenizer import TextStream
from runtime.serving.request import Delta, Finish, Logprob, Request, Result
from runtime.serving.sampler import Sampler, logprob_of


class ServedSequence:
    """The state of one request: tokens, cache row, forecast, waiting so far."""

    def __init__(
        self, request: Request, prompt_ids: list[int], tokenizer: Any, number: int
    ) -> None:
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
        self._sampler = Sampler(request)
        self._text = TextStream(tokenizer, request.stop)
        self._logprobs: list[Logprob] = []
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

    def accept(self, greedy: int, logits_V: Any, eos_ids: frozenset[int]) -> Finish | None:
        """Choose the next token; returns how the request ends, if it does."""
        token_id = self._sampler.choose(greedy, logits_V)
        if self.num_generated == 0:
            self.first_token = time.perf_counter()
        self.token_ids.append(token_id)
        if self.request.logprobs is not None:
            self._logprobs.append(logprob_of(token_id, logits_V, self.request.logprobs))
        finish = self._add_text(token_id, eos_ids)
        if finish is None and self.num_generated == self.request.max_tokens:
            finish = "length"
        return finish

    def _add_text(self, token_id: int, eos_ids: frozenset[int]) -> Finish | None:
        ended = token_id in eos_ids and not self.request.ignore_eos
        last = ended or self.num_generated == self.request.max_tokens
        piece = "" if ended else self._text.push(token_id)
        if last:
            piece += self._text.finish()
        if self.request.on_token is not None:
            logprob = self._logprobs[-1] if self._logprobs else None
            self.request.on_token(Delta(self.request.id, token_id, piece, logprob))
        return "stop" if ended or self._text.stopped else None

    def result(self, finish: Finish, error: str = "") -> Result:
        """The request's end, as the caller gets it."""
        return Result(
            id=self.request.id,
            text=self._text.text,
            token_ids=tuple(self.token_ids[self.num_prompt :]),
            num_prompt=self.num_prompt,
            finish=finish,
            logprobs=tuple(self._logprobs),
            error=error,
            arrived=self.arrived,
            first_token=self.first_token,
            finished=time.perf_counter(),
        )
