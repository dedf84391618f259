"""Validation of requests: their prompts as token ids, within what can be served."""

from __future__ import annotations

from typing import Any, NamedTuple

from runtime.serving.inputs.prompt import prompt_ids
from runtime.serving.request import Request


class Validator(NamedTuple):
    """The limits of requests."""

    tokenizer: Any
    """None where prompts are token ids."""
    vocab_size: int
    context: int

    def encode(self, request: Request) -> list[int]:
        """The prompt's token ids. Raises ValueError for a request that cannot be served."""
        if self.tokenizer is None and (isinstance(request.prompt, str) or request.stop):
            raise ValueError("text prompts and stop strings need serve(..., tokenizer=)")
        ids = prompt_ids(request.prompt, self.tokenizer)
        if not ids:
            raise ValueError("the prompt is empty")
        if not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"the prompt has token ids outside 0 to {self.vocab_size - 1}")
        for name in ("logit_bias", "stop_token_ids"):
            if strange := [i for i in getattr(request, name) if i >= self.vocab_size]:
                raise ValueError(
                    f"{name} has the token id {strange[0]} outside 0 to {self.vocab_size - 1}"
                )
        if len(ids) + request.max_tokens > self.context:
            raise ValueError(
                f"{len(ids)} prompt tokens and max_tokens={request.max_tokens} exceed the context "
                f"of {self.context} tokens"
            )
        return ids
