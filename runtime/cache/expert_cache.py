"""The expert cache: the slot table, and the choice of victims.

Pure bookkeeping on the host, shared by the runtime (which moves bytes as it says) and by the
simulator (which moves none), so that both count the same hits. A *key* is layer * E + expert.

    slot     owner                    key        slot
    0        key 17   <- resident     17         0
    1        -1       <- free         0          -1   <- not resident
    2        key 900                  900        2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from runtime.cache.policy import Policy

FREE = -1
LAST_VICTIMS = 1e300
"""The value of what a call still needs in a later range: evicted where nothing else is left."""


class Lookup(NamedTuple):
    """Slots for the experts of one request, and the loads that come first."""

    experts: np.ndarray
    """int64 [N], the experts asked for in this wave."""
    slots: np.ndarray
    """int64 [N], the slot of each."""
    missed: np.ndarray
    """bool [N]; a missed expert's bytes must be copied into its slot before use."""
    num_evicted: int
    """Residents that were evicted."""


class ExpertCache:
    """One pool of slots for the experts of several layers (all of one shape).

    num_slots: capacity S. layers: L, num_experts: E (of the whole policy's value table).
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, policy: Policy) -> None:
        assert num_slots > 0
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.policy = policy
        self.slot_of_key = np.empty(num_layers * num_experts, np.int64)
        self.key_of_slot = np.empty(num_slots, np.int64)
        self.version = 0
        """Another one whenever the table changes."""
        self.clear()

    @property
    def num_resident(self) -> int:
        return self.num_slots - len(self._free)

    def waves(self, layer: int, experts: np.ndarray) -> Iterator[Lookup]:
        """Serve the distinct `experts` (int64 [N], ascending) of one call of `layer`.

        One wave where they fit the slots; else several, the residents first, so that no expert is
        loaded twice and none is evicted before it ran. A wave must have run before the next is
        taken: it may be evicted by it.
        """
        self.policy.touch(layer, experts)
        if len(experts) > self.num_slots:
            resident = self.slot_of_key[layer * self.num_experts + experts] != FREE
            experts = np.concatenate([experts[resident], experts[~resident]])
        for start in range(0, len(experts), self.num_slots):
            yield self._request(layer, experts[start : start + self.num_slots])

    def ranges(self, layer: int, experts: np.ndarray, span: int) -> Iterator[Lookup]:
        """Serve the distinct `experts` (int64 [N], ascending) of one call, `span` ids at a time.

        Captured steps of many sequences do so: a range that has run gives its slots to the next,
        and what later ranges need is evicted last. A range must have run before the next is taken;
        one must fit the slots.
        """
        self.policy.touch(layer, experts)
        first = layer * self.num_experts
        for start in range(0, self.num_experts, span):
            now = experts[(experts >= start) & (experts < start + span)]
            if len(now):
                yield self._request(layer, now, first + experts[experts >= start + span])

    def admit(self, layer: int, experts: np.ndarray, pinned: np.ndarray) -> Lookup:
        """Slots for the missing of `experts` (int64 [N]) of `layer`, ahead of their call.

        pinned: int64 keys that must stay. As many as there is room for beside those and the ones
        of `experts` that are resident already; the returned lookup holds only what is to be loaded.
        """
        keys = layer * self.num_experts + experts
        missed = self.slot_of_key[keys] == FREE
        pinned = np.concatenate([pinned, keys[~missed]])
        held = np.count_nonzero(self.slot_of_key[pinned] != FREE)
        missing = keys[missed][: max(self.num_slots - held, 0)]
        num_evicted = self._admit(pinned, missing)
        slots = self.slot_of_key[missing]
        return Lookup(missing % self.num_experts, slots, np.ones(len(slots), bool), num_evicted)

    def _request(
        self, layer: int, experts: np.ndarray, later: Sequence[int] | np.ndarray = ()
    ) -> Lookup:
        keys = layer * self.num_experts + experts
        missed = self.slot_of_key[keys] == FREE
        num_evicted = self._admit(keys, keys[missed], later) if missed.any() else 0
        return Lookup(experts, self.slot_of_key[keys], missed, num_evicted)

    def _admit(
        self, pinned: np.ndarray, missing: np.ndarray, later: Sequence[int] | np.ndarray = ()
    ) -> int:
        num_evicted = max(len(missing) - len(self._free), 0)
        if num_evicted:
            self._free.extend(self._evict(num_evicted, pinned, later).tolist())
        self.version += 1
        slots = [self._free.pop() for _ in missing]
        self.slot_of_key[missing] = slots
        self.key_of_slot[slots] = missing
        return num_evicted

    def _evict(
        self, count: int, pinned: np.ndarray, later: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Free `count` slots: the residents of lowest value that the current wave does not need;
        those of the keys `later` after all others.
        """
        values_S = self.policy.values.take(self.key_of_slot)
        values_S[self._free] = np.inf
        for keys, value in ((later, LAST_VICTIMS), (pinned, np.inf)):
            if len(keys):
                held = self.slot_of_key[keys]
                values_S[held[held != FREE]] = value
        victims = lowest(values_S, count)
        assert (values_S[victims] < np.inf).all(), "a wave never exceeds the slots"
        self.slot_of_key[self.key_of_slot[victims]] = FREE
        return victims

    def clear(self) -> None:
        """Start empty again, whatever the slot table says: some bytes did not arrive."""
        self.version += 1
        self.slot_of_key.fill(FREE)
        self.key_of_slot.fill(FREE)
        self._free = list(range(self.num_slots - 1, -1, -1))

    def adopt(self, key_of_slot: np.ndarray) -> None:
        """Take over a slot table (the key in each slot, int [S]) that was kept elsewhere."""
        self.clear()
        self.key_of_slot[:] = key_of_slot
        owned = np.flatnonzero(self.key_of_slot != FREE)
        self.slot_of_key[self.key_of_slot[owned]] = owned
        self._free = np.flatnonzero(self.key_of_slot == FREE)[::-1].tolist()

    def check_integrity(self) -> None:
        """Assert conservation: each slot one owner, resident + free = capacity, no key twice."""
        resident = np.flatnonzero(self.slot_of_key != FREE)
        owned = np.flatnonzero(self.key_of_slot != FREE)
        assert len(resident) == len(owned) == self.num_resident
        assert len(set(self._free)) == len(self._free)
        assert (self.key_of_slot[self._free] == FREE).all()
        assert np.array_equal(self.key_of_slot[self.slot_of_key[resident]], resident)
        assert np.array_equal(self.slot_of_key[self.key_of_slot[owned]], owned)


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` lowest values; ties go to the lower index, so that runs repeat."""
    if count == 1:
        return np.array([values.argmin()])
    if count >= len(values):
        return np.arange(len(values))
    threshold = np.partition(values, count - 1)[count - 1]
    below = np.flatnonzero(values < threshold)
    ties = np.flatnonzero(values == threshold)
    return np.concatenate([below, ties[: count - len(below)]])
