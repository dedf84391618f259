"""The doorbell: memory through which experts are asked for and their answer is given.

Every field starts on a cache line of its own:

    bell    int32: written last by who asks; another value than the last one
    order   int32: layer, count, expert ids [top_k]
    x       bfloat16 [hidden]
    answer  float32 [top_k, hidden]: row i for expert i of the order, without its router weight
    done    int32: the bell's value, written last by who answers
"""

from __future__ import annotations

from dataclasses import dataclass

LINE = 64


@dataclass(frozen=True)
class Doorbell:
    """Where the fields are, in bytes from a start that is a multiple of 64."""

    top_k: int
    hidden: int

    bell = 0
    order = LINE

    @property
    def x(self) -> int:
        return self.order + _lines(4 * (2 + self.top_k))

    @property
    def answer(self) -> int:
        return self.x + _lines(2 * self.hidden)

    @property
    def done(self) -> int:
        return self.answer + _lines(4 * self.top_k * self.hidden)

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return self.done + LINE


def _lines(num_bytes: int) -> int:
    """Bytes of the whole cache lines that hold so many."""
    return -(-num_bytes // LINE) * LINE
