"""Turns: the requests of one group, such as the choices of one answer, wait for each other first.

The turn of a waiting sequence is the number of rows that its group has, plus those of its group
that wait before it. Lower turns are served first, so every group gets a row before any gets its
second, and a request by itself, whose turn is 0, never queues behind the rest of a large group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from runtime.serving.sequence import ServedSequence

NUMBER = attrgetter("number")


def group_of(sequence: ServedSequence) -> Hashable:
    """The group of a sequence; itself where it is in none."""
    return sequence.request.group or sequence


def turns_of(
    sequences: Iterable[ServedSequence], active: Iterable[ServedSequence] = ()
) -> dict[ServedSequence, int]:
    """The turn of each of the `sequences`, which come in their order of waiting."""
    counts = Counter(group_of(one) for one in active)
    turns = {}
    for sequence in sequences:
        group = group_of(sequence)
        turns[sequence] = counts[group]
        counts[group] += 1
    return turns


def in_turn(
    sequences: Sequence[ServedSequence], active: Iterable[ServedSequence], limit: int
) -> Iterator[list[ServedSequence]]:
    """The first `limit` sequences in lists of one priority and turn: the highest priority first,
    then the lowest turn, each by arrival.
    """
    groups = {one.request.group for one in sequences}
    alone = len(groups) == 1  # all of one group, or none in any: nobody to take turns with
    if alone and len({one.request.priority for one in sequences}) == 1:
        if first := sorted(sequences, key=NUMBER)[:limit]:
            yield first
        return
    turns = dict.fromkeys(sequences, 0) if alone else turns_of(sequences, active)

    def rank(sequence: ServedSequence) -> tuple[int, int]:
        return -sequence.request.priority, turns[sequence]

    ranked = sorted(sequences, key=lambda one: (rank(one), one.number))[:limit]
    for _, same in groupby(ranked, key=rank):
        yield list(same)


def heads(sequences: Iterable[ServedSequence]) -> list[ServedSequence]:
    """The first of each group."""
    return list({group_of(one): one for one in reversed(list(sequences))}.values())[::-1]


class Yielding(NamedTuple):
    """A sequence in flight that gives its row to a waiting one."""

    sequence: ServedSequence
    to: ServedSequence


def owed(waiting: Iterable[ServedSequence], active: Sequence[ServedSequence]) -> Iterator[Yielding]:
    """The waiting whose group would have fewer rows than another even with one more, each with the
    youngest of that group, whose priority is no higher.
    """
    rows = Counter(group_of(one) for one in active)
    if max(rows.values(), default=0) < 2:
        return
    largest: dict[int, ServedSequence | None] = {}
    for one in waiting:
        priority = one.request.priority
        if priority not in largest:
            below = (other for other in active if other.request.priority <= priority)
            largest[priority] = max(
                below, key=lambda other: (rows[group_of(other)], other.number), default=None
            )
        other = largest[priority]
        if other is not None and rows[group_of(one)] + 1 < rows[group_of(other)]:
            yield Yielding(other, one)
