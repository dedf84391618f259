"""The tokens and texts that end a request."""

from __future__ import annotations

import unicodedata
from typing import Any, NamedTuple

from runtime.serving.request import Request


class Ends(NamedTuple):
    """Of one request."""

    token_ids: frozenset[int]
    """Tokens that end it."""
    told_ids: frozenset[int]
    """Those of them that the request names, rather than the model."""
    texts: tuple[str, ...]
    """Stop strings, in each form that Unicode calls equal."""

    @classmethod
    def of(cls, request: Request, tokenizer: Any, eos_ids: frozenset[int]) -> Ends:
        """eos_ids: the model's. Raises ValueError for a stop string that no text can hold."""
        special, told, texts = _special_tokens(tokenizer), set(request.stop_token_ids), []
        for stop in request.stop or ():
            if stop in special:  # the text leaves special tokens out, so the token itself counts
                told.add(special[stop])
            elif held := next((token for token in special if token and token in stop), None):
                raise ValueError(
                    f"the stop string {stop!r} holds the special token {held!r}, which is no part "
                    f"of a text: stop at {held!r} by itself, or give stop_token_ids"
                )
            else:
                forms = (stop, *(unicodedata.normalize(form, stop) for form in ("NFC", "NFD")))
                texts += [form for form in dict.fromkeys(forms) if form]
        goes_on = request.ignore_eos and request.json_schema is None  # else the JSON says
        model_ids = frozenset() if goes_on else eos_ids
        return cls(model_ids | told, frozenset(told), tuple(texts))


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that decoding leaves out, by their text."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token.content: token_id for token_id, token in added.items() if token.special}
