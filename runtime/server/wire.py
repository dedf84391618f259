"""Requests and answers as OpenAI's API writes them: what is understood, and how it is said.

A field that is not understood is refused rather than ignored: an answer must not pretend.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

from runtime.serving.chat import render_chat
from runtime.serving.request import Delta, Request, Result

MAX_PROMPTS = 64
FINISH = {"stop": "stop", "length": "length", "cancelled": "stop", "error": "stop"}
Kind = Literal["text_completion", "chat.completion"]


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None
    priority: int = 0
    ignore_eos: bool = False

    def options(self, max_tokens: int) -> dict[str, Any]:
        """The fields of a `Request` other than its prompt."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        names = ("temperature", "top_p", "top_k", "seed", "priority", "ignore_eos")
        return {name: getattr(self, name) for name in names} | {
            "max_tokens": max_tokens,
            "stop": tuple(stop),
        }

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    kind: ClassVar[Kind] = "text_completion"

    def requests(self, tokenizer: Any) -> list[Request]:
        """One request a prompt."""
        prompts: list[Any] = (
            self.prompt
            if isinstance(self.prompt, list) and not all(isinstance(i, int) for i in self.prompt)
            else [self.prompt]
        )
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"{len(prompts)} prompts in one request: send at most {MAX_PROMPTS}")
        options = self.options(self.max_tokens)
        return [Request(id=uuid4().hex, prompt=prompt, **options) for prompt in prompts]


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    kind: ClassVar[Kind] = "chat.completion"

    def requests(self, tokenizer: Any) -> list[Request]:
        """The one request."""
        max_tokens = self.max_completion_tokens or self.max_tokens or 128
        prompt = render_chat(tokenizer, self.messages)
        return [Request(id=uuid4().hex, prompt=prompt, **self.options(max_tokens))]


Body = CompletionBody | ChatBody


class Answer:
    """Builds the answer to one body, whole or in pieces."""

    def __init__(self, kind: Kind, model: str) -> None:
        self._kind = kind
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        self._head = {"id": f"{prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, results: list[Result]) -> dict[str, Any]:
        choices = [
            self._said(index, result.text, whole=True)
            | {"finish_reason": FINISH[result.finish], "logprobs": None}
            for index, result in enumerate(results)
        ]
        return self._head | {"object": self._kind, "choices": choices, "usage": usage(results)}

    def opening(self) -> dict[str, Any] | None:
        """What a streamed chat says first: who speaks."""
        if self._kind == "text_completion":
            return None
        delta = {"role": "assistant", "content": ""}
        return self._piece([{"index": 0, "delta": delta, "finish_reason": None}])

    def piece(self, index: int, item: Delta | Result) -> dict[str, Any]:
        """A piece of text, or the end of one choice."""
        finish = FINISH[item.finish] if isinstance(item, Result) else None
        text = "" if isinstance(item, Result) else item.text
        return self._piece([self._said(index, text, whole=False) | {"finish_reason": finish}])

    def closing(self, results: list[Result]) -> dict[str, Any]:
        """The usage, for who asked for it."""
        return self._piece([]) | {"usage": usage(results)}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = self._kind if self._kind == "text_completion" else f"{self._kind}.chunk"
        return self._head | {"object": kind, "choices": choices}

    def _said(self, index: int, text: str, *, whole: bool) -> dict[str, Any]:
        if self._kind == "text_completion":
            return {"index": index, "text": text}
        if whole:
            return {"index": index, "message": {"role": "assistant", "content": text}}
        return {"index": index, "delta": {"content": text} if text else {}}


def usage(results: list[Result]) -> dict[str, int]:
    """Tokens in and out."""
    prompt = sum(result.num_prompt for result in results)
    completion = sum(len(result.token_ids) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def error(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as the clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
