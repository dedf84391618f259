"""What hangs on a model, and taking it off again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class Attachment:
    """Changes to other objects, each with its way back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def add(self, *undo: Callable[[], Any]) -> None:
        """Something was done that these undo."""
        self._undo.extend(undo)

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Give one object an attribute of its own, before that of its class."""
        owner.__dict__[name] = value
        self.add(partial(owner.__dict__.pop, name))

    def keep(self, owner: Any, name: str) -> None:
        """Whatever becomes of this attribute meanwhile, it gets its value back."""
        self.add(partial(setattr, owner, name, getattr(owner, name)))

    def undo(self) -> None:
        """Take everything back, the last change first. Idempotent."""
        while self._undo:
            self._undo.pop()()
