"""Rows with a prompt or messages as requests."""

from __future__ import annotations

from typing import Any

from runtime.serving.batch.columns import OPTIONS
from runtime.serving.chat import render_chat
from runtime.serving.request import Request


def to_request(
    data: dict[str, Any],
    id: str,
    tokenizer: Any,
    defaults: dict[str, Any],
    template: str | None = None,
) -> Request:
    """The request of one row. Raises ValueError for a row that makes none.

    template: the chat template in place of the tokenizer's own.
    """
    options = {key: data[key] for key in OPTIONS if data.get(key) is not None}
    return Request(prompt=_prompt(data, tokenizer, template), id=id, **(defaults | options))


def _prompt(data: dict[str, Any], tokenizer: Any, template: str | None) -> str | list[int]:
    prompt, messages = data.get("prompt"), data.get("messages")
    if prompt is not None and messages is not None:
        raise ValueError("the row has both a prompt and messages: leave one of them out")
    if messages is not None:
        return render_chat(tokenizer, messages, template, data.get("tools"))
    if data.get("tools") is not None:
        raise ValueError("the row has tools but no messages")
    if not isinstance(prompt, str | list):
        raise ValueError("the row has neither a prompt of text nor messages")
    return prompt
