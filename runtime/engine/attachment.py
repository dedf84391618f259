"""Changes made to a model, and how each is undone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

Undo = Callable[[], Any]


class Attachment:
    """A list of changes to other objects, undone in reverse order.

    Some changes hold memory or references (hooks, slots, pinned experts): these are undone by
    `release` too, which leaves the others as they are.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Undo, bool]] = []

    def add(self, *undo: Undo, holds: bool = False) -> None:
        """Remember how a change is undone. holds: `release` undoes it too."""
        self._undo.extend((one, holds) for one in undo)

    def put(self, owner: Any, name: str, value: Any, *, holds: bool = True) -> None:
        """Give one object an attribute of its own, which hides its class's."""
        owner.__dict__[name] = value
        self.add(partial(owner.__dict__.pop, name, None), holds=holds)

    def keep(self, owner: Any, name: str) -> None:
        """Remember the present value of an attribute that may change meanwhile."""
        self.add(partial(setattr, owner, name, getattr(owner, name)))

    def undo(self) -> None:
        """Undo everything, the last change first. Idempotent."""
        while self._undo:
            self._undo.pop()[0]()

    def release(self) -> None:
        """Undo what holds memory or references, and forget the rest. Idempotent."""
        while self._undo:
            undo, holds = self._undo.pop()
            if holds:
                undo()
