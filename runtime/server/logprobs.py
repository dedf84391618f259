"""Log-probabilities as OpenAI writes them, for completions and for chats.

A token that is but a part of a character has no text of its own: it reads as U+FFFD, without bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.serving.detokenizer import UNFINISHED
from runtime.serving.request import Logprob


def of_completion(logprobs: Sequence[Logprob], tokenizer: Any, offset: int) -> dict[str, Any]:
    """Lists over the tokens. offset: where the first one stands in the text of all of them."""
    tokens = [tokenizer.decode([one.token_id]) for one in logprobs]
    offsets = [offset + sum(map(len, tokens[:at])) for at in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [_by_text(one, tokenizer) for one in logprobs],
        "text_offset": offsets,
    }


def _by_text(one: Logprob, tokenizer: Any) -> dict[str, float]:
    """The likeliest, by their text; of those that read alike, the likelier."""
    said: dict[str, float] = {}
    for token_id, value in one.top:
        said.setdefault(tokenizer.decode([token_id]), value)
    return said


def of_chat(logprobs: Sequence[Logprob], tokenizer: Any) -> dict[str, Any]:
    """An object a token."""
    content = [
        _token(one.token_id, one.logprob, tokenizer)
        | {"top_logprobs": [_token(*likely, tokenizer) for likely in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token_id: int, logprob: float, tokenizer: Any) -> dict[str, Any]:
    text: str = tokenizer.decode([token_id])
    known = None if UNFINISHED in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known}
