"""Log-probabilities as OpenAI and vLLM write them, for completions, chats and prompts.

JSON has no infinity: what is impossible has the log-probability -9999.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.server.protocol.token_text import TokenText
from runtime.serving.detokenizer import TextStream
from runtime.serving.request import Logprob

LEAST = -9999.0


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST)


def of_completion(
    logprobs: Sequence[Logprob | None], ids: Sequence[int], offsets: Sequence[int], text: TokenText
) -> dict[str, Any]:
    """Lists over the tokens. ids: of all tokens. None: a prompt's first token has no probability.

    offsets: where each token stands in the text of all of them.
    """
    return {
        "tokens": [text.named(token_id) for token_id in ids],
        "token_logprobs": [None if one is None else finite(one.logprob) for one in logprobs],
        "top_logprobs": [None if one is None else _by_text(one, text) for one in logprobs],
        "text_offset": list(offsets),
    }


def _by_text(one: Logprob, text: TokenText) -> dict[str, float]:
    """The likeliest and the token itself, by their text; of those that read alike, the likelier."""
    said: dict[str, float] = {}
    for token_id, value in (*one.top, (one.token_id, one.logprob)):
        said.setdefault(text.named(token_id), finite(value))
    return said


def of_chat(logprobs: Sequence[Logprob], text: TokenText) -> dict[str, Any]:
    """An object a token."""
    content = [
        _token(one.token_id, one.logprob, text)
        | {"top_logprobs": [_token(*likely, text) for likely in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token_id: int, logprob: float, text: TokenText) -> dict[str, Any]:
    known = text.bytes_of(token_id)
    listed = None if known is None else list(known)
    return {"token": text.shown(token_id), "logprob": finite(logprob), "bytes": listed}


def of_prompt(logprobs: Sequence[Logprob | None], count: int, text: TokenText) -> list[Any]:
    """The `prompt_logprobs` of vLLM: the `count` likeliest and the token itself, by id."""
    return [None if one is None else _by_id(one, count, text) for one in logprobs]


def trimmed(one: Logprob | None, count: int) -> Logprob | None:
    """With no more than the `count` likeliest."""
    return None if one is None else one._replace(top=one.top[:count])


def _by_id(one: Logprob, count: int, text: TokenText) -> dict[str, Any]:
    """The rank of a token that is none of the likeliest is not known."""
    known: dict[int, tuple[float, int | None]] = {
        token_id: (value, rank) for rank, (token_id, value) in enumerate(one.top[:count], 1)
    }
    known.setdefault(one.token_id, (one.logprob, None))
    return {
        str(token_id): {
            "logprob": finite(value),
            "rank": rank,
            "decoded_token": text.named(token_id),
        }
        for token_id, (value, rank) in known.items()
    }


class Offsets:
    """Where the tokens of a text begin in it, as they come."""

    def __init__(self, tokenizer: Any, lead: str = "") -> None:
        """lead: begins the text, as a part of its first token, though decoding strips it."""
        self._text, self._lead, self._is_first = TextStream(tokenizer), len(lead), True

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Offsets of the next tokens; those that share a character share its offset."""
        offsets = []
        for token_id in token_ids:
            offsets.append(0 if self._is_first else self._lead + len(self._text.text))
            self._is_first = False
            self._text.push(token_id)
        return offsets
