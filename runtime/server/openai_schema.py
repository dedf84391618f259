"""Requests and answers as OpenAI's API writes them: what is understood, and how it is said.

A field that is not understood is refused rather than ignored: an answer must not pretend.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from runtime.server.logprobs import of_chat, of_completion
from runtime.serving.chat import render_chat
from runtime.serving.request import Delta, Logprob, Request, Result

MAX_CHOICES = 64
FINISH = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}
Kind = Literal["text_completion", "chat.completion"]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(BaseModel):
    """Fields that both kinds of request share."""

    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    user: str | None = None
    priority: int = 0
    ignore_eos: bool = False

    def requests_of(
        self, prompts: list[Any], max_tokens: int, logprobs: int | None
    ) -> list[Request]:
        """`n` requests a prompt, each with a seed of its own where there is one."""
        if len(prompts) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(prompts)} prompts with n={self.n}: ask for at most {MAX_CHOICES} choices"
            )
        options = self._options() | {"max_tokens": max_tokens, "logprobs": logprobs}
        seeds = [None if self.seed is None else self.seed + choice for choice in range(self.n)]
        return [
            Request(id=uuid4().hex, prompt=prompt, seed=seed, **options)
            for prompt in prompts
            for seed in seeds
        ]

    def _options(self) -> dict[str, Any]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        names = ("temperature", "top_p", "top_k", "priority", "ignore_eos")
        return {name: getattr(self, name) for name in names} | {"stop": tuple(stop)}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)
    kind: ClassVar[Kind] = "text_completion"

    def requests(self, tokenizer: Any) -> list[Request]:
        """`n` requests a prompt."""
        prompts: list[Any] = (
            self.prompt
            if isinstance(self.prompt, list) and not all(isinstance(i, int) for i in self.prompt)
            else [self.prompt]
        )
        return self.requests_of(prompts, self.max_tokens, self.logprobs)


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    kind: ClassVar[Kind] = "chat.completion"

    def requests(self, tokenizer: Any) -> list[Request]:
        """`n` requests."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        max_tokens = self.max_completion_tokens or self.max_tokens or 128
        prompt = render_chat(tokenizer, self.messages)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.requests_of([prompt], max_tokens, logprobs)


Body = CompletionBody | ChatBody


class Answer:
    """Builds the answer to one body, whole or in pieces."""

    def __init__(self, body: Body, tokenizer: Any) -> None:
        self._kind, self._n, self._tokenizer = body.kind, body.n, tokenizer
        prefix = "cmpl" if body.kind == "text_completion" else "chatcmpl"
        name = f"{prefix}-{uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": body.model}
        self._offsets: dict[int, int] = {}

    def whole(self, results: list[Result]) -> dict[str, Any]:
        choices = [
            self._said(index, result.text, whole=True)
            | {"finish_reason": FINISH[result.finish]}
            | {"logprobs": self._logprobs(index, result.logprobs)}
            for index, result in enumerate(results)
        ]
        return self._head | {"object": self._kind, "choices": choices, "usage": self.usage(results)}

    def opening(self) -> list[dict[str, Any]]:
        """The first event of a streamed chat: the speaker of each choice."""
        if self._kind == "text_completion":
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._piece([{"index": index, "delta": delta, "finish_reason": None}])
            for index in range(self._n)
        ]

    def piece(self, index: int, item: Delta | Result) -> dict[str, Any] | None:
        """A piece of text, or the end of one choice; None where there is nothing to say."""
        if isinstance(item, Result):
            said = self._said(index, "", whole=False) | {"finish_reason": FINISH[item.finish]}
            return self._piece([said | {"logprobs": None}])
        if not item.text and item.logprob is None:
            return None
        logprobs = self._logprobs(index, () if item.logprob is None else (item.logprob,))
        said = self._said(index, item.text, whole=False) | {"finish_reason": None}
        return self._piece([said | {"logprobs": logprobs}])

    def closing(self, results: list[Result]) -> dict[str, Any]:
        """The usage, where it was asked for."""
        return self._piece([]) | {"usage": self.usage(results)}

    def usage(self, results: list[Result]) -> dict[str, int]:
        """Tokens in and out; a prompt counts once, however many choices it has."""
        prompt = sum(result.num_prompt for result in results) // self._n
        completion = sum(len(result.token_ids) for result in results)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = self._kind if self._kind == "text_completion" else f"{self._kind}.chunk"
        return self._head | {"object": kind, "choices": choices}

    def _said(self, index: int, text: str, *, whole: bool) -> dict[str, Any]:
        if self._kind == "text_completion":
            return {"index": index, "text": text}
        if whole:
            return {"index": index, "message": {"role": "assistant", "content": text}}
        return {"index": index, "delta": {"content": text} if text else {}}

    def _logprobs(self, index: int, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        """The log-probabilities of one choice's newest tokens."""
        if not logprobs:
            return None
        if self._kind == "chat.completion":
            return of_chat(logprobs, self._tokenizer)
        said = of_completion(logprobs, self._tokenizer, self._offsets.get(index, 0))
        self._offsets[index] = said["text_offset"][-1] + len(said["tokens"][-1])
        return said


def error(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as the clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
