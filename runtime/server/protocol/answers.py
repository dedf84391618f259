"""Answers, whole or in pieces: what completions and chats share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from runtime.server.protocol.logprobs import of_prompt
from runtime.server.protocol.sampling import Sampling
from runtime.server.protocol.token_text import TokenText
from runtime.serving.request import Delta, Result

Event = dict[str, Any]

FINISH = {"stop": "stop", "length": "length"}
"""OpenAI's words for the ends of a choice."""


class Answer(ABC):
    """Builds the answer to one body."""

    prefix: str
    """Of its id."""
    chunk: str
    """The kind of its pieces."""

    def __init__(
        self, body: Sampling, model: str, prompts: Sequence[list[int]], text: TokenText
    ) -> None:
        self._body, self._prompts, self._text = body, prompts, text
        name = f"{self.prefix}-{uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model}
        self._num_generated: Counter[int] = Counter()

    @abstractmethod
    def choice(self, index: int, result: Result) -> Event:
        """One choice, whole."""

    @abstractmethod
    def pieces(self, index: int, item: Delta | Result) -> list[Event]:
        """Choices of the events for a token, or for the end."""

    def opening(self) -> list[Event]:
        """Choices of the events before all others."""
        return []

    def extras(self, results: Sequence[Result]) -> Event:
        """Fields of the whole answer beside its choices."""
        return {}

    def whole(self, results: Sequence[Result]) -> Event:
        choices = [self.choice(index, result) for index, result in enumerate(results)]
        answer = self._head | {"object": self._body.kind, "choices": choices}
        return answer | {"usage": self.usage(results)} | self.extras(results)

    def first_events(self) -> list[Event]:
        return [self._event([choice]) for choice in self.opening()]

    def events(self, index: int, item: Delta | Result) -> list[Event]:
        """The events for a token, or for the end of one choice; none where nothing is to say."""
        if isinstance(item, Delta):
            self._num_generated[index] += 1
        return [self._event([choice]) for choice in self.pieces(index, item)]

    def closing(self, results: Sequence[Result]) -> list[Event]:
        """The usage, where it was asked for."""
        return [self._event([]) | {"usage": self.usage(results)}] if self._body.wants_usage else []

    def usage(self, results: Sequence[Result]) -> dict[str, int]:
        return self._usage(sum(len(result.token_ids) for result in results))

    def _usage(self, completion: int) -> dict[str, int]:
        """Tokens in and out; a prompt counts once, however many choices it has."""
        prompt = sum(map(len, self._prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _event(self, choices: list[Event]) -> Event:
        event = self._head | {"object": self.chunk, "choices": choices}
        if not self._body.wants_usage:
            return event
        so_far = self._body.stream_options.continuous_usage_stats
        return event | {"usage": self._usage(self._num_generated.total()) if so_far else None}

    def _prompt_logprobs(self, result: Result) -> list[Any]:
        count = self._body.prompt_logprobs or 0
        return of_prompt(result.prompt_logprobs, count, self._text)
