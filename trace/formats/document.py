"""The contract of a foreign format, and the checks that all formats share.

A format is a module with `read(path, stack, options) -> Iterator[ForeignDocument]`. It raises
ValueError, saying where in the file, for whatever does not fit the stack.

T tokens, L MoE layers, K experts a token, F layers in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from routing.shards import GENERATED, PROMPT, Document, stored_experts
from routing.topology import NO_EXPERT, Stack
from trace.formats.settings import ImportSettings

Read = Callable[[Path, Stack, ImportSettings], Iterator["ForeignDocument"]]
"""Reads one file (or a directory, where the format says so)."""


class ForeignDocument(NamedTuple):
    """One sequence out of a foreign trace."""

    experts_TLK: np.ndarray
    """Signed ids of the stack's own layers, NO_EXPERT for none."""
    token_ids_T: np.ndarray | None
    """None where the format has none."""
    num_prompt: int
    """Tokens of the prompt; the rest were generated."""
    where: str
    """Its place in the file, for messages."""
    label: str | None = None


def document_of(found: ForeignDocument, stack: Stack, vocab_size: int, label: str) -> Document:
    """The document as a trace holds it. Raises ValueError for what no model of the stack does."""
    check_routes(found.experts_TLK, stack, found.where)
    ids_T = _token_ids(found, vocab_size)
    phase_T = np.full(len(ids_T), GENERATED, np.uint8)
    phase_T[: found.num_prompt] = PROMPT
    try:
        experts_TLK = stored_experts(found.experts_TLK, stack.num_experts)
    except ValueError as error:
        raise ValueError(
            f"{found.where}: {error}; leave prompts out with --generated-only if it is their "
            "tokens that have none"
        ) from error
    return Document(ids_T, experts_TLK, phase_T, found.label or label)


def check_routes(experts_TLK: np.ndarray, stack: Stack, where: str) -> None:
    """Raise ValueError unless every token uses distinct experts that its layer has."""
    _, num_layers, top_k = experts_TLK.shape
    if (num_layers, top_k) != (stack.num_layers, stack.top_k):
        raise ValueError(
            f"{where}: {num_layers} layers of {top_k} experts a token, but the model has "
            f"{stack.num_layers} of {stack.top_k}"
        )
    for index, layer in enumerate(stack.layers):
        experts_TK = experts_TLK[:, index]
        wrong = (experts_TK < NO_EXPERT) | (experts_TK >= layer.num_experts)
        if wrong.any():
            token, _ = np.argwhere(wrong)[0]
            raise ValueError(
                f"{where}: token {token} uses expert {experts_TK[wrong][0]} of {layer.name}, which "
                f"has {layer.num_experts}"
            )
        ordered_TK = np.sort(experts_TK, axis=-1)
        twice = (np.diff(ordered_TK, axis=-1) == 0) & (ordered_TK[:, 1:] != NO_EXPERT)
        if twice.any():
            token, slot = np.argwhere(twice)[0]
            raise ValueError(
                f"{where}: token {token} uses expert {ordered_TK[token, slot]} of {layer.name} "
                "twice: that layer was not recorded, or the axes are in another order"
            )


def _token_ids(found: ForeignDocument, vocab_size: int) -> np.ndarray:
    length = len(found.experts_TLK)
    if found.token_ids_T is None:
        return np.zeros(length, np.int32)
    ids_T = np.asarray(found.token_ids_T)
    if len(ids_T) != length:
        raise ValueError(f"{found.where}: {len(ids_T)} token ids for the routes of {length} tokens")
    if length and (ids_T.min() < 0 or ids_T.max() >= vocab_size):
        raise ValueError(f"{found.where}: token ids outside the vocabulary of {vocab_size}")
    return ids_T.astype(np.int32)


def layer_columns(numbers: Sequence[int], stack: Stack, where: str) -> list[int]:
    """For each layer of the stack, its place among the file's layers, which have `numbers`.

    The file may count all layers of the model, dense ones too, or its MoE layers alone. Raises
    ValueError for layers that are missing.
    """
    if len(numbers) == stack.num_layers:
        return list(range(stack.num_layers))
    places = {number: place for place, number in enumerate(numbers)}
    wanted = [layer_number(layer.name) for layer in stack.layers]
    missing = [layer.name for layer, n in zip(stack.layers, wanted, strict=True) if n not in places]
    if missing or len(set(wanted)) != len(wanted):
        raise ValueError(
            f"{where}: {len(numbers)} layers, but the model has {stack.num_layers} MoE layers; "
            f"missing: {', '.join(missing) or 'numbers in their names'}"
        )
    return [places[number] for number in wanted if number is not None]


def layer_number(name: str) -> int | None:
    """The layer's number within the model: the first number in the name of its experts module."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None
