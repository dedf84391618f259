"""Validation of requests: their prompts as token ids, within what can be served."""

from __future__ import annotations

from typing import Any, NamedTuple

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
        ids = self._ids(request.prompt)
        if not ids:
            raise ValueError("the prompt is empty")
        if not all(0 <= i < self.vocab_size for i in ids):
            raise ValueError(f"the prompt has token ids outside 0 to {self.vocab_size - 1}")
        if len(ids) + request.max_tokens > self.context:
            raise ValueError(
                f"{len(ids)} prompt tokens and max_tokens={request.max_tokens} exceed the context "
                f"of {self.context} tokens"
            )
        return ids

    def _ids(self, prompt: Any) -> list[int]:
        try:
            if isinstance(prompt, str):
                return list(self.tokenizer(prompt).input_ids)
            return [int(token) for token in prompt]
        except (TypeError, ValueError, OverflowError) as error:  # a tokenizer raises several kinds
            shown = shortened(prompt)
            raise ValueError(
                f"the prompt {shown} is neither text that can be encoded nor token ids ({error})"
            ) from error


def shortened(value: Any) -> str:
    """A value as it is written, in short; its type where it cannot be written."""
    try:
        return f"{value!r:.60}"
    except Exception:  # a number of too many digits, a list within itself, a class of the caller's
        return f"of type {type(value).__name__}"
