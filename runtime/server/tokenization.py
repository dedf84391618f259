"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

from fastapi import Request

from runtime.server.errors import Refused
from runtime.server.json_body import read_json
from runtime.server.protocol.chat import Conversation
from runtime.server.protocol.fields import Body
from runtime.server.protocol.sampling import Kind


class TokenizeBody(Body):
    """A text to tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(Conversation):
    """A conversation to tokenize."""

    return_token_strs: bool = False
    kind: ClassVar[Kind] = "chat.completion"


class DetokenizeBody(Body):
    """Token ids to make a text of."""

    tokens: list[int]
    model: str | None = None


class Tokenization:
    """The tokenizer over HTTP."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        check_model: Callable[[str | None], None],
        *,
        context: int,
        vocab_size: int,
    ) -> None:
        self._tokenizer, self._template, self._check_model = tokenizer, template, check_model
        self._context, self._vocab_size = context, vocab_size

    async def tokenize(self, http: Request) -> dict[str, Any]:
        """The token ids of a text, or of messages."""
        data = await read_json(http)
        body = TokenizeBody.of(data) if "messages" not in data else TokenizeChatBody.of(data)
        self._check_model(body.model)
        ids = await asyncio.to_thread(self._encode, body)
        shown = self._tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": self._context,
            "tokens": ids,
            "token_strs": shown,
        }

    async def detokenize(self, http: Request) -> dict[str, str]:
        """The text of token ids, special tokens included."""
        body = DetokenizeBody.of(await read_json(http))
        self._check_model(body.model)
        if not all(0 <= token_id < self._vocab_size for token_id in body.tokens):
            outside = f"tokens: there are token ids outside 0 to {self._vocab_size - 1}"
            raise Refused(400, outside, param="tokens")
        return {"prompt": await asyncio.to_thread(self._tokenizer.decode, body.tokens)}

    def _encode(self, body: TokenizeBody | TokenizeChatBody) -> list[int]:
        if isinstance(body, TokenizeChatBody):
            return body.rendered(self._tokenizer, self._template)
        special = body.add_special_tokens
        return list(self._tokenizer(body.prompt, add_special_tokens=special).input_ids)
