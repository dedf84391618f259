"""Conversations as prompts, through the tokenizer's chat template."""

from __future__ import annotations

from typing import Any


def render_chat(tokenizer: Any, messages: Any) -> list[int]:
    """Token ids of `messages` up to where the assistant's answer begins.

    Raises ValueError where the tokenizer has no chat template or the template rejects them.
    """
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise ValueError("messages must be a list of objects with a role and a content of text")
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template: give a prompt instead")
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template can raise anything; what it says is about the messages
        raise ValueError(f"the chat template rejects these messages: {error!s:.200}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )
