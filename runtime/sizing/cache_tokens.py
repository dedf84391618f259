"""`cache_tokens`: room of the key/value cache for the tokens of all sequences together.

It is worth less memory than rows x context where most sequences are shorter than `context`.
"""

from __future__ import annotations

from typing import Any


def require_cache_tokens(cache_tokens: Any, context: int) -> None:
    """Raise ValueError for a number that one sequence may already exceed."""
    if cache_tokens is None:
        return
    if not isinstance(cache_tokens, int) or isinstance(cache_tokens, bool):
        raise ValueError(f"cache_tokens={cache_tokens!r} is not a whole number")
    if cache_tokens < context:
        raise ValueError(
            f"cache_tokens={cache_tokens} has no room for one sequence of context={context}: "
            "raise it, or lower context"
        )


def fewer_than(all_tokens: int, cache_tokens: int | None) -> int | None:
    """`cache_tokens`, where it is fewer than `all_tokens`."""
    if cache_tokens is None or cache_tokens >= all_tokens:
        return None
    return cache_tokens
