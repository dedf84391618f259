"""Choices of one prompt, which runs once: the others get its keys, values and last logits.

Choices are sequences of one group with the same prompt. The first in flight runs it; those that are
in flight as well wait for it, and those that are admitted later find its end here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from runtime.engine.next_tokens import NextTokens
from runtime.serving.sequence import ServedSequence
from runtime.serving.steps.rows import Kept, Rows, held_by, wants_whole_prompt

Key = tuple[str, tuple[int, ...]]


class PromptEnd(NamedTuple):
    """What a prompt's last token gave. L layers, K experts."""

    following: NextTokens
    number: int
    """Of the next token, among `following`."""
    routes_LK: np.ndarray
    kept: Kept | None = None
    """The whole prompt's keys and values, where other choices wait for a row."""


class Choices:
    """Shares prompts between the sequences of one loop."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._ends: dict[Key, PromptEnd] = {}

    def leaders(self, beginning: Iterable[ServedSequence]) -> Iterator[ServedSequence]:
        """The sequences whose prompts are to run, of those that do not decode: of choices, one."""
        seen = set()
        for sequence in beginning:
            key = _key(sequence)
            if key is None or key not in seen:
                yield sequence
            seen.add(key)

    def share(
        self,
        leader: ServedSequence,
        end: PromptEnd,
        active: Iterable[ServedSequence],
        waiting: Iterable[ServedSequence],
    ) -> list[ServedSequence]:
        """Give what `leader` has just run to the other choices; returns those in flight."""
        key = _key(leader)
        if key is None:
            return []
        others = [one for one in active if one is not leader and _key(one) == key]
        for other in others:
            self._rows.adopt(other, held_by(leader), leader.num_prompt)
        if any(_key(one) == key for one in waiting):
            kept = self._rows.keep(leader)
            alone = end.following.alone(end.number)
            self._ends[key] = PromptEnd(alone, 0, end.routes_LK, kept)
        return others

    def take_row(
        self, sequence: ServedSequence, active: Sequence[ServedSequence]
    ) -> PromptEnd | None:
        """Give a row to a sequence; the end of its prompt, if another choice has run it."""
        key = _key(sequence)
        end = None if key is None else self._ends.get(key)
        self._rows.take(sequence, active, None if end is None else end.kept)
        return end

    def forget(self, waiting: Iterable[ServedSequence]) -> None:
        """Drop what no waiting sequence needs any more."""
        if self._ends:
            wanted = {_key(one) for one in waiting}
            self._ends = {key: end for key, end in self._ends.items() if key in wanted}


def _key(sequence: ServedSequence) -> Key | None:
    """Equal for choices of one prompt that have not begun; None for a sequence by itself."""
    group = sequence.request.group
    if not group or sequence.num_generated or wants_whole_prompt(sequence):
        return None
    return group, tuple(sequence.token_ids)
