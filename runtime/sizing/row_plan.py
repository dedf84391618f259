"""The number of sequences that decode together: rows of the key/value cache take memory from slots.

With more sequences a pass over all experts serves more tokens; but their keys and values leave
fewer slots, so that more experts cross the link in every pass. Keys and values in pages take the
memory of as many tokens as the sequences have on average, not of as many as the longest may have.
Where the slots have nothing left to give, pages may lie in host memory, and cross the link as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

NEAR_BEST = 0.97
"""Of the highest speed, what fewer sequences must reach to be preferred."""


class RowChoice(NamedTuple):
    """A number of sequences, and the least time of a step of them."""

    rows: int
    slots: int
    link_s: float
    """Seconds of the link, for the experts that have no slot and the pages in host memory."""
    device_s: float
    """Seconds in which the device reads all weights, keys and values."""
    cache_tokens: int | None = None
    """Of all sequences, for which there is room; None: for the longest of each."""
    spill_tokens: int = 0
    """Further ones, in host memory."""

    @property
    def tokens_per_s(self) -> float:
        """The bound on the speed."""
        return self.rows / max(self.link_s, self.device_s)

    @property
    def bound(self) -> str:
        """What the speed is bound by."""
        return "the link" if self.link_s > self.device_s else "the GPU's memory"


def best_choice(choices: Iterable[RowChoice]) -> RowChoice:
    """The fewest sequences whose bound is near the highest one."""
    found = list(choices)
    least = NEAR_BEST * max(choice.tokens_per_s for choice in found)
    return min((choice for choice in found if choice.tokens_per_s >= least), key=lambda c: c.rows)
