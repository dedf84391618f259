"""The body of POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator

from runtime.server.errors import Refused, bad_request
from runtime.server.protocol.sampling import Kind, Sampling
from runtime.serving.request import Request

Prompt = str | list[int]


class CompletionBody(Sampling):
    """A text to continue, or several."""

    prompt: list[Prompt]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    kind: ClassVar[Kind] = "text_completion"

    @field_validator("prompt", mode="before")
    @classmethod
    def _list_prompts(cls, prompt: Any) -> list[Prompt]:
        """Several prompts, whichever of its four forms the field has."""
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise ValueError("the prompt is empty" if prompt == [] else "the prompt is no text")
        prompts: list[Any] = prompt if isinstance(prompt[0], str | list) else [prompt]
        for one in prompts:
            ids = one if isinstance(one, list) else []
            if not isinstance(one, str | list) or not all(type(token) is int for token in ids):
                raise ValueError("a prompt is neither text nor a list of token ids")
            if one == []:
                raise ValueError("a prompt is empty")
        return prompts

    def check(self, *, max_choices: int, max_priority: int) -> None:
        super().check(max_choices=max_choices, max_priority=max_priority)
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            asked = "max_tokens=0: generate at least 1 token, or ask for echo"
            raise Refused(400, asked, param="max_tokens")
        if self.stream and self.echo and self.logprobs is not None:
            raise Refused(400, "echo with logprobs cannot be streamed", param="echo")

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    def encoded(self, tokenizer: Any) -> list[list[int]]:
        """The token ids of each prompt. Raises Refused."""
        special = self.add_special_tokens is not False
        try:
            return [
                list(tokenizer(one, add_special_tokens=special).input_ids)
                if isinstance(one, str)
                else one
                for one in self.prompt
            ]
        except Exception as error:  # tokenizers raise many kinds, all about the text
            raise bad_request(error, {}, self.prompt_field) from error

    def requests(self, prompts: Sequence[list[int]], context: int) -> list[Request]:
        scored = self.prompt_logprobs
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            scored = max(self.logprobs or 0, scored or 0)
        asked = {"logprobs": self.logprobs, "prompt_logprobs": scored}
        return self.requests_of(prompts, self.max_tokens, context, **asked)
