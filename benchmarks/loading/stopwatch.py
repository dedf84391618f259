"""Seconds that the threads of a process spend in chosen functions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def timed(functions: dict[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Time functions, given by a name and as (owner, attribute), while the block runs.

    Yields the seconds by name, of all threads together.
    """
    seconds = dict.fromkeys(functions, 0.0)
    lock = threading.Lock()

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                with lock:
                    seconds[name] += time.perf_counter() - start

        return call

    with ExitStack() as stack:
        for name, (owner, attribute) in functions.items():
            replaced = watched(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, replaced))
        yield seconds
