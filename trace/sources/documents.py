"""Documents on their way into a trace, and a tally of those that were left out or repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Text(NamedTuple):
    """A document as its source has it."""

    content: str | list[dict[str, Any]]
    """A string, or the turns of a chat: {role, content}."""
    label: str


class Prompt(NamedTuple):
    """A document as the model reads it."""

    number: int
    """Its place in the trace."""
    ids: list[int]
    label: str
    num_cut: int
    """Tokens left out at the end, because the document is longer than allowed."""
    has_more: bool = False
    """Whether there is text beyond these, which was never turned into tokens."""


@dataclass
class Tally:
    """Counts of documents that a user should know of."""

    num_empty: int = 0
    """Documents without any text, left out."""
    num_repeated: int = 0
    """Documents with the same tokens as an earlier one; they are traced all the same."""
    _seen: set[bytes] = field(default_factory=set)

    def count(self, ids: Sequence[int]) -> None:
        """Note a document's tokens."""
        digest = hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=16).digest()
        self.num_repeated += digest in self._seen
        self._seen.add(digest)

    def lines(self) -> Iterator[str]:
        """Each count that is not 0, in words."""
        if self.num_empty:
            yield f"documents without any text, left out: {self.num_empty:,}"
        if self.num_repeated:
            yield (
                "documents that repeat an earlier one token by token, traced all the same: "
                f"{self.num_repeated:,}"
            )
