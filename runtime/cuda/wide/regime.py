"""The regime of streamed passes: when nearly every expert is used again and again."""

from __future__ import annotations

MOST_USED, LEAST_USED = 0.85, 0.7
"""Shares of all experts that a pass uses: from which passes are streamed, and below which not."""
SHORTER = 0.5
"""Tokens, of those of the shortest of these passes, with which one is thought to use as much."""
PASSES = 2
"""Passes in a row that used so much."""


class Regime:
    """Knows by the passes before whether the next one will use nearly all experts."""

    def __init__(self) -> None:
        self._in_a_row, self._num_tokens = 0, 0

    def expects_all(self, num_tokens: int) -> bool:
        """Whether a pass of so many tokens will probably use nearly all experts."""
        return self._in_a_row >= PASSES and num_tokens >= SHORTER * self._num_tokens

    def saw(self, num_tokens: int, used: float) -> None:
        """A pass has used this share of all experts."""
        least = LEAST_USED if self._in_a_row >= PASSES else MOST_USED
        if used < least:
            self.broke_off()
        else:
            fewest = num_tokens if not self._in_a_row else min(self._num_tokens, num_tokens)
            self._in_a_row, self._num_tokens = self._in_a_row + 1, fewest

    def broke_off(self) -> None:
        """Something else has run, which may want other experts in the slots."""
        self._in_a_row = 0
