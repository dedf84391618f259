"""Errors of requests and of steps: their text, whatever it is made of, and whose fault they are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from runtime.serving.request import Fault, Result, next_id

PASSED_ON = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Raised by those who run the process or end a generator: no request's own error.

All else is, even where it is no `Exception`: a panic of the tokenizers library, a cancelled task.
"""
LONGEST = 600


def reason_of(error: BaseException) -> str:
    """One text for `error`, valid Unicode and not longer than a page; the user's mistakes without
    the name of their class.
    """
    try:
        text = str(error)
    except Exception:  # an error's own text can fail as well
        text = "it has no text"
    if not isinstance(error, ValueError) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def fault_at_arrival(error: BaseException) -> Fault:
    """Whose fault an error is that a request raised while it was taken in."""
    return "server" if isinstance(error, MemoryError | OSError) else "request"


def fault_in_step(error: BaseException) -> Fault:
    """Whose fault an error is that came of choosing a request's token, or of its text."""
    is_own = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
    return "request" if is_own else "server"


def refusal(item: Any, error: str, fault: Fault) -> Result:
    """The end of a request that was not taken in, or of what makes no request."""
    given = item.get("id") if isinstance(item, Mapping) else getattr(item, "id", None)
    now = time.perf_counter()
    return Result(
        id=given if isinstance(given, str) else next_id(), text="", token_ids=(), num_prompt=0,
        finish="error", fault=fault, error=error, arrived=now, finished=now,
    )  # fmt: skip
