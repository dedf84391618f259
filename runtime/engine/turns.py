"""Turns at one engine: threads wait for each other, in the order in which they came.

A turn is a forward pass, a whole `generate`, or one step of `engine.serve`: while it lasts, slots,
predictor and key/value storage belong to one thread. The thread itself may begin turns within its
turn, as `generate` does with every forward pass.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

Guard = Callable[[], AbstractContextManager[Any]]


class Turns:
    """A fair re-entrant lock: `with turns: ...`.

    guard: a context that every outermost turn runs in.
    Raises ValueError in a process that was forked off after the engine was made: threads, files
    and a GPU's memory do not go along.
    """

    def __init__(self, guard: Guard = nullcontext) -> None:
        self._guard = guard
        self._guarding: AbstractContextManager[Any] = nullcontext()
        self._queue, self._lock = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._process = os.getpid()

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn, and is no fork of it."""
        return self._owner == threading.get_ident() and os.getpid() == self._process

    def __enter__(self) -> Self:
        if os.getpid() != self._process:
            raise ValueError(
                "this model was offloaded in another process, which forked this one; call "
                "runtime.load here, or start processes with the method 'spawn'"
            )
        if not self.is_mine:
            self._wait()
        self._depth += 1
        return self

    def _wait(self) -> None:
        """Whoever waits holds `_queue`, so that the thread that had the last turn comes after."""
        with self._queue:
            self._lock.acquire()
        try:
            self._owner = threading.get_ident()
            self._guarding = self._guard()
            self._guarding.__enter__()
        except BaseException:
            self._let_go()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            try:
                self._guarding.__exit__(kind, error, trace)
            finally:
                self._let_go()

    def _let_go(self) -> None:
        self._depth, self._owner = 0, None
        self._lock.release()
