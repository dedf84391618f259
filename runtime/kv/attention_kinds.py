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


def most_independent_tokens(config: Any) -> int | None:
    """Tokens up to which a sequence's positions are encoded the same whatever runs beside it; None
    for any number.

    Beyond, some models rotate the keys of a whole step by the length of its longest sequence.
    """
    given = getattr(config, "rope_parameters", None) or {}
    found = [given] if "rope_type" in given else list(given.values())
    limits = []
    for parameters in (one for one in found if isinstance(one, dict)):
        kind = str(parameters.get("rope_type"))
        if "dynamic" in kind:
            limits.append(config.max_position_embeddings - 1)  # from there on nothing is reset
        elif kind == "longrope":
            original = parameters.get("original_max_position_embeddings")
            limits.append(original or config.max_position_embeddings)
    return min(limits, default=None)


def require_rows(config: Any, context: int) -> None:
    """Raise ValueError where sequences of up to `context` tokens cannot be served side by side."""
    others = attention_types(config) - PLAIN
    if others:
        raise ValueError(
            f"the model has layers of type {', '.join(sorted(others))}, which cannot be served "
            "together yet; use model.generate"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"the model's attention is {config._attn_implementation}; load it with "
            "attn_implementation='sdpa' to serve it"
        )
    most = most_independent_tokens(config)
    if most is not None and context > most:
        raise ValueError(
            f"context={context}: beyond {most} tokens this model encodes positions by the longest "
            "sequence of a step, so requests served together would change each other's tokens; "
            f"serve with context={most} or less, or use model.generate"
        )
