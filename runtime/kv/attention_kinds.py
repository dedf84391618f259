"""The kinds of attention that a model's layers have, and which of them can be captured."""

from __future__ import annotations

from typing import Any

PLAIN = {"full_attention", "sliding_attention"}
"""Attention types that a cache of all positions and a mask can serve."""


def attention_types(config: Any) -> set[str]:
    """The kinds of attention that the model's layers have."""
    types = getattr(config, "layer_types", None)
    if types:
        return set(types)
    windowed = getattr(config, "sliding_window", None) is not None
    return {"sliding_attention" if windowed else "full_attention"}


def unsupported(config: Any) -> str | None:
    """Why a model's attention cannot run captured; None where it can."""
    types = attention_types(config)
    if not types <= PLAIN:
        return f"it has layers of type {', '.join(sorted(types - PLAIN))}"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention implementation is {config._attn_implementation}, not sdpa or eager"
    return None
