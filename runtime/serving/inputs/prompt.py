"""Prompts: text, token ids in any container, or a tokenizer's own output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime.serving.inputs import fields

IDS, MASK = "input_ids", "attention_mask"
ENCODING = (IDS, MASK, "token_type_ids", "special_tokens_mask", "length")
"""What a tokenizer's output may hold."""


def as_prompt(prompt: Any) -> Any:
    """`prompt` as text or a list of token ids, where it is one; else as it is, to be refused by
    `prompt_ids`.
    """
    if isinstance(prompt, Mapping) and IDS in prompt:
        rows = list(encoded_rows(prompt))
        return rows[0] if len(rows) == 1 else rows
    ids = _listed(prompt)
    only = isinstance(ids, list | tuple) and len(ids) == 1 and isinstance(ids[0], list | tuple)
    return ids[0] if only else ids


def encoded_rows(encoding: Mapping[str, Any]) -> Iterator[list[int]]:
    """The prompts in a tokenizer's output, without padding."""
    ids, mask = _listed(encoding[IDS]), _listed(encoding.get(MASK))
    rows = ids if _is_nested(ids) else [ids]
    masks = [[1] * len(row) for row in rows] if mask is None else mask
    masks = masks if _is_nested(masks) else [masks]
    for row, kept in zip(rows, masks, strict=True):
        yield [token for token, keep in zip(row, kept, strict=True) if keep]


def prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """The token ids of a prompt in the form of `as_prompt`. Raises ValueError."""
    try:
        if isinstance(prompt, str):
            return list(tokenizer(prompt).input_ids)
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
            raise TypeError(f"it is of type {type(prompt).__name__}")
        if _is_nested(prompt) and len(prompt) > 1:
            raise ValueError(f"it holds {len(prompt)} prompts: make a request of each")
        if all(type(token) is int for token in prompt):
            return list(prompt)
        return [fields.whole("a token id", token) for token in prompt]
    except (TypeError, ValueError, OverflowError) as error:  # a tokenizer raises several kinds
        raise ValueError(
            f"the prompt {fields.shown(prompt)} is neither text that can be encoded nor token ids "
            f"({error})"
        ) from error


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_nested(ids: Any) -> bool:
    return isinstance(ids, list | tuple) and bool(ids) and isinstance(ids[0], list | tuple)
