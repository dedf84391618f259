"""Room of the key/value cache for the tokens of all sequences together.

cache_tokens  on the GPU, fewer than rows x context where most sequences are shorter than `context`
spill_tokens  further ones, in pages of pinned host memory
"""

from __future__ import annotations

from typing import Any


def require_cache_tokens(cache_tokens: Any, context: int) -> None:
    """Raise ValueError for a number that one sequence may already exceed."""
    if cache_tokens is None:
        return
    _require_whole("cache_tokens", cache_tokens)
    if cache_tokens < context:
        raise ValueError(
            f"cache_tokens={cache_tokens} has no room for one sequence of context={context}: "
            "raise it, or lower context"
        )


def require_spill_tokens(spill_tokens: Any, cache_tokens: int | None) -> None:
    """Raise ValueError for a number that nothing could make use of."""
    if spill_tokens is None:
        return
    _require_whole("spill_tokens", spill_tokens)
    if spill_tokens < 0:
        raise ValueError(f"spill_tokens={spill_tokens} is negative")
    if cache_tokens is None:
        raise ValueError(
            f"spill_tokens={spill_tokens} without cache_tokens=: the GPU would have room for every "
            "sequence, and none would spill; give cache_tokens= of what the GPU is to hold"
        )


def refuse_spill_tokens(spill_tokens: int | None) -> None:
    """Raise ValueError for what is asked of a CPU."""
    if spill_tokens is not None:
        raise ValueError(
            f"spill_tokens={spill_tokens} is room beyond a GPU's memory; on a CPU keys and values "
            "are in host memory: leave it out, and raise cache_tokens= of what serves"
        )


def _require_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not a whole number")


def spilled_of(all_tokens: int, cache_tokens: int | None, spill_tokens: int | None) -> int:
    """`spill_tokens`, as far as sequences of `all_tokens` can make use of them."""
    if fewer_than(all_tokens, cache_tokens) is None or cache_tokens is None:
        return 0
    return min(spill_tokens or 0, all_tokens - cache_tokens)


def fewer_than(all_tokens: int, cache_tokens: int | None) -> int | None:
    """`cache_tokens`, where it is fewer than `all_tokens`."""
    if cache_tokens is None or cache_tokens >= all_tokens:
        return None
    return cache_tokens
