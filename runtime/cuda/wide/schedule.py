"""The schedule of streamed passes: which experts stay, and in which order the others go by.

Of every layer the first experts stay in slots of their own. The others go, group by group and in
the same order in every pass, through the slots that are left, the ring:

    slots   | staying, layer by layer            | ring              |
    layer l   stay | stay | group | group | group   each group to the next place in the ring

A group may take its place once the last group that was there has run. So what is copied, from where
to where and after what, is known before any token is routed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

RING_GROUPS = 4
"""Groups that the ring holds: one that runs, one that arrives, and others to make up for layers
that take longer than their copies."""
NONE = -1


class Group(NamedTuple):
    """Experts of a layer that follow each other, in slots that do."""

    layer: int
    first: int
    end: int
    slot: int
    """Of the first of them."""
    streams: bool
    """Whether they come anew in every pass."""

    @property
    def size(self) -> int:
        return self.end - self.first


class Copy(NamedTuple):
    """A streamed group, and what has to have run before it takes its place."""

    group: int
    """Its index among all groups of a pass."""
    after: int
    """The index of the last group before it that was in one of its slots: of the previous pass, if
    it is one of the first that go `ahead`."""


class Schedule:
    """The groups of a pass over `num_layers` layers of `num_experts`, in their order.

    num_slots: fewer than all experts together. most: experts of a group.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, most: int) -> None:
        assert 1 < num_slots < num_layers * num_experts
        self.num_slots = num_slots
        most = max(1, min(most, num_slots // 2, num_experts))
        missing = num_layers * num_experts - num_slots
        self.ring = min(RING_GROUPS * most, num_slots, max(2 * most, missing))
        stay, more = divmod(num_slots - self.ring, num_layers)
        self.staying = [stay + (layer < more) for layer in range(num_layers)]
        """Experts of each layer that stay: its first ones."""
        self.groups: list[Group] = []
        self.layers: list[range] = []
        """The indices of each layer's groups."""
        self._place, slot = 0, 0
        for layer, count in enumerate(self.staying):
            start = len(self.groups)
            for first, end in _cut(0, count, most):
                self.groups.append(Group(layer, first, end, slot + first, False))
            for first, end in _cut(count, num_experts, most):
                place = num_slots - self.ring + self._next_place(end - first)
                self.groups.append(Group(layer, first, end, place, True))
            slot += count
            self.layers.append(range(start, len(self.groups)))
        self.copies = self._copies()
        """Of the streamed groups, in their order."""

    def _next_place(self, size: int) -> int:
        """Where in the ring the next group goes: behind the last one, or in front again."""
        place = 0 if self._place + size > self.ring else self._place
        self._place = place + size
        return place

    def _copies(self) -> list[Copy]:
        streamed = [index for index, group in enumerate(self.groups) if group.streams]
        copies, after = [], NONE
        for number, index in enumerate(streamed):
            here = (one for one in reversed(streamed[:number]) if self._share(one, index))
            after = max(after, next(here, NONE))
            if after == NONE:
                before = (one for one in reversed(streamed) if self._share(one, index))
                copies.append(Copy(index, next(before)))
            else:
                copies.append(Copy(index, after))
        return copies

    def _share(self, one: int, other: int) -> bool:
        """Whether two groups have a slot in common."""
        first, second = self.groups[one], self.groups[other]
        return first.slot < second.slot + second.size and second.slot < first.slot + first.size

    @property
    def ahead(self) -> int:
        """Copies, the first ones, that find their places before a pass begins."""
        return next(
            (n for n, copy in enumerate(self.copies) if copy.after < copy.group), len(self.copies)
        )

    @property
    def num_streamed(self) -> int:
        """Experts that cross the link in every pass."""
        return sum(self.groups[copy.group].size for copy in self.copies)


def _cut(first: int, end: int, most: int) -> list[tuple[int, int]]:
    """A range in parts of about one size, of at most `most`."""
    if first == end:
        return []
    count = -(-(end - first) // most)
    bounds = [first + (end - first) * part // count for part in range(count + 1)]
    return list(pairwise(bounds))
