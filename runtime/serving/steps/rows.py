"""Rows of the key/value cache: who has one, what the free ones still hold, who is parked.

    waiting --take--> in flight --release--> free, and its tokens are remembered
               ^          |
               +--resume--+--park-->  waiting, keys and values in host memory

A remembered row serves a new sequence that begins with the same tokens: it is taken over, or
copied. Whatever is copied is the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.kv.row_cache import RowCache
from runtime.kv.saved_row import SavedRow, copy_row
from runtime.kv.state_kinds import KINDS, layer_types
from runtime.serving.sequence import ServedSequence
from runtime.serving.steps.row_pages import RowPages

SHORTEST = 8
"""Tokens in common from which on a row is reused."""


class Held(NamedTuple):
    """Tokens whose keys and values are in a row."""

    row: int
    token_ids: list[int]
    routes: list[np.ndarray]
    """Of these tokens, where they are recorded."""


class Kept(NamedTuple):
    """The same outside of the cache."""

    saved: SavedRow
    routes: list[np.ndarray]


class Rows:
    """The rows of one serving loop. reuse: whether requests may begin with the rows of others."""

    def __init__(self, cache: RowCache, config: object, *, reuse: bool) -> None:
        others = {name for name in layer_types(config) if not KINDS[name].keeps_positions}
        if reuse and others:
            raise ValueError(
                f"prefix_reuse: what layers of type {', '.join(sorted(others))} keep cannot be cut "
                "after a prompt's beginning; serve without"
            )
        self._cache, self._reuse = cache, reuse
        self._held: dict[int, Held] = {}
        """Of free rows, the one that was freed first in front."""
        self._parked: dict[ServedSequence, Kept] = {}
        self.pages = RowPages(cache)
        self.num_reused = 0
        """Prompt tokens that did not run, as another row had them."""

    @property
    def num_rows(self) -> int:
        return self._cache.num_rows

    @property
    def runs_prompts_whole(self) -> bool:
        """Whether a prompt must run in one piece."""
        return self._cache.runs_prompts_whole

    @property
    def can_repeat(self) -> bool:
        """Whether tokens that ran may run once more: they leave what they left the first time."""
        return not any(kind.recurs for kind in self._cache.kinds)

    @property
    def num_free(self) -> int:
        return self._cache.num_free

    def grow(self, sequence: ServedSequence, spared: int = -1) -> bool:
        """Whether the row of a sequence has room for all its tokens now. What free rows hold gives
        way, but for that of row `spared`.
        """
        while self.pages.missing(sequence):
            row = next((row for row in self._held if row != spared), None)
            if row is None:
                break
            self._forget(row)
        return self.pages.grow(sequence)

    def _forget(self, row: int) -> None:
        """Let go of what a free row holds."""
        if self._held.pop(row, None) is not None and self._cache.pages is not None:
            self._cache.pages.cut(row)

    @property
    def num_parked(self) -> int:
        """Sequences whose keys and values are in host memory."""
        return len(self._parked)

    def take(
        self,
        sequence: ServedSequence,
        active: Sequence[ServedSequence],
        given: Kept | None = None,
    ) -> None:
        """Give a row to a sequence; it goes on from what is kept of it, or of its beginning.

        given: keeps a beginning that it has in common with another.
        """
        kept = self._parked.pop(sequence, given)
        source = None if kept is not None else self._source(sequence, active)
        length = 0 if source is None else _reusable(source.token_ids, sequence.token_ids)
        sequence.row = self._cache.take(self._room(source, length))
        self.pages.in_flight[sequence.row] = sequence
        if source is None or source.row != sequence.row:
            self._forget(sequence.row)
        source, length = self._make_room(sequence, source, length)
        if kept is not None:
            kept.saved.restore(self._cache, sequence.row)
            self._begin(sequence, kept.saved.num_tokens, kept.routes)
        elif source is not None:
            self.adopt(sequence, source, length)

    def _make_room(
        self, sequence: ServedSequence, source: Held | None, length: int
    ) -> tuple[Held | None, int]:
        """Pages for all tokens of a sequence that has got its row; `source`, unless it gave way,
        and the tokens that are taken from it.
        """
        if source is not None and source.row == sequence.row:
            del self._held[sequence.row]
            if self._cache.pages is not None:
                length = self._cache.pages.cut(sequence.row, length)
        elif source is not None and not self.grow(sequence, spared=source.row):
            source = None
        if not self.grow(sequence):
            raise RuntimeError("the key/value cache has no page left for a sequence admitted to it")
        return source, length

    def keep(self, sequence: ServedSequence) -> Kept:
        """A copy of what the row of `sequence` holds."""
        saved = SavedRow.of(self._cache, sequence.row, sequence.num_cached)
        return Kept(saved, list(sequence.routes))

    def _source(self, sequence: ServedSequence, active: Iterable[ServedSequence]) -> Held | None:
        """The row that begins with most of its tokens; None where that is not worth it."""
        if not self._reuse or wants_whole_prompt(sequence):
            return None
        rows = [*self._held.values(), *(held_by(one) for one in active if one.row >= 0)]
        lengths = [_reusable(held.token_ids, sequence.token_ids) for held in rows]
        longest = max(lengths, default=0)
        return rows[lengths.index(longest)] if longest >= SHORTEST else None

    def adopt(self, sequence: ServedSequence, source: Held, num_tokens: int) -> None:
        """Let the row of `sequence` begin with the first `num_tokens` of another row, or of its
        own from before.
        """
        if sequence.row != source.row:
            copy_row(self._cache, source.row, sequence.row, num_tokens)
        self._begin(sequence, num_tokens, source.routes)

    def _begin(self, sequence: ServedSequence, num_tokens: int, routes: list[np.ndarray]) -> None:
        self.num_reused += max(num_tokens - sequence.num_cached, 0)
        sequence.num_cached = num_tokens
        sequence.routes = [np.concatenate(routes)[:num_tokens]] if routes else []

    def release(self, sequence: ServedSequence, *, is_sound: bool = True) -> None:
        """Free the row of a sequence that ended or is parked, if it has one. is_sound: others may
        use what it holds.
        """
        self._parked.pop(sequence, None)
        if sequence.row < 0:
            return
        holds = is_sound and self._reuse
        if holds:
            cached = sequence.token_ids[: sequence.num_cached]
            self._held[sequence.row] = Held(sequence.row, cached, list(sequence.routes))
        self._cache.release(sequence.row, keep=holds)
        del self.pages.in_flight[sequence.row]
        sequence.row = -1

    def park(self, sequence: ServedSequence) -> None:
        """Free the row of a sequence in flight, which keeps all that it has computed."""
        kept = self.keep(sequence) if sequence.num_cached else None
        self.release(sequence)
        if kept is not None:
            self._parked[sequence] = kept

    def claim(self, active: Iterable[ServedSequence]) -> bool:
        """Before a step and after it: where others have written to the rows, sequences in flight
        run all of their tokens again. False in that case.
        """
        if self._cache.claim():
            return True
        for row in list(self._held):
            self._forget(row)
        for sequence in active:
            self.start_over(sequence)
        return False

    def start_over(self, sequence: ServedSequence) -> bool:
        """Let all tokens of a sequence run again, over pages of the device; False where there are
        not enough of them now.
        """
        sequence.start_over()
        if self._cache.pages is not None:
            self._cache.pages.cut(sequence.row)
        return self.grow(sequence)

    def _room(self, source: Held | None, length: int) -> int:
        """The free row to take: the source itself, where most of it is wanted; else an empty one,
        else the one that was freed first.
        """
        others = [row for row in self._cache.free_rows if source is None or row != source.row]
        free = source is not None and source.row in self._held
        if free and source is not None and (not others or 2 * length >= len(source.token_ids)):
            return source.row
        empty = [row for row in others if row not in self._held]
        return empty[-1] if empty else next(row for row in self._held if row in others)


def wants_whole_prompt(sequence: ServedSequence) -> bool:
    """Whether a request asks for something that takes a pass over all tokens of its prompt."""
    return getattr(sequence.request, "prompt_logprobs", None) is not None


def held_by(sequence: ServedSequence) -> Held:
    """What the row of a sequence in flight holds."""
    return Held(sequence.row, sequence.token_ids[: sequence.num_cached], sequence.routes)


def _reusable(held: list[int], token_ids: list[int]) -> int:
    """Tokens that need not run: the last one always does, for its logits."""
    return min(_in_common(held, token_ids), len(token_ids) - 1)


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the beginning that both share."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices compare at the speed of C
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
