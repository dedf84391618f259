"""Structured output: the tokens that may come next where the text is JSON that fits a schema.

By llguidance, an optional dependency. What it does not understand of a schema, it refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

ANY_OBJECT = {"type": "object"}
WHITESPACE: Any = {"whitespace_pattern": r"( |\n {0,32}|\n\t{0,8})?"}
"""Between the parts of a JSON: compact or indented, never without end. A schema's own `x-guidance`
comes before it.
"""

_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
"""A tokenizer's tokens as llguidance reads them, by its end tokens: reading them takes long."""


class Grammar(LogitsProcessor):
    """The state of one request's JSON."""

    def __init__(self, schema: Any, tokenizer: Any, end_ids: Iterable[int]) -> None:
        """end_ids: tokens that end a text. Raises ValueError."""
        vocabulary = _vocabulary(tokenizer, tuple(sorted(end_ids)))
        from llguidance import LLMatcher

        schema = ANY_OBJECT if schema is True else schema
        grammar = LLMatcher.grammar_from_json_schema(schema, defaults=WHITESPACE)
        self._matcher = LLMatcher(vocabulary, grammar)
        self._check("json_schema cannot be followed")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check("json_schema cannot be followed any further")
        allowed = np.unpackbits(packed, count=None, bitorder="little").astype(bool)
        width = min(scores.shape[-1], len(allowed))
        masked = torch.full_like(scores, -torch.inf)
        masked[:, :width] = scores[:, :width].where(torch.from_numpy(allowed[:width]), -torch.inf)
        return masked

    def take(self, token_id: int) -> None:
        """Go on after a token that the mask allows."""
        self._matcher.consume_token(token_id)
        self._check("json_schema cannot be followed any further")

    @property
    def ended(self) -> bool:
        """True when the JSON is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self, complaint: str) -> None:
        if self._matcher.is_error():
            raise ValueError(f"{complaint}: {' '.join(self._matcher.get_error().split()):.300}")


def _vocabulary(tokenizer: Any, end_ids: tuple[int, ...]) -> Any:
    """A tokenizer's tokens, read once. Raises ValueError where llguidance cannot read them."""
    if tokenizer is None:
        raise ValueError("json_schema needs serve(..., tokenizer=)")
    try:
        from llguidance import hf
    except ImportError as error:
        raise ValueError(
            "json_schema needs llguidance: pip install 'moe-expertflow[serve]'"
        ) from error
    known = _vocabularies.setdefault(tokenizer, {})
    if end_ids not in known:
        try:
            known[end_ids] = hf.from_tokenizer(tokenizer, eos_token=list(end_ids) or None)
        except Exception as error:  # the extension raises several kinds
            raise ValueError(f"json_schema cannot use this tokenizer: {error!s:.200}") from error
    return known[end_ids]
