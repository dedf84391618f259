"""LRU's shadow: an LRU cache that moves no bytes, over the routes of the live one.

It counts what `ExpertCache` under the policy `LRU` counts, in a fraction of the time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class LRUShadow:
    """`num_slots` slots for experts of which each layer has `num_experts`.

    residents: the keys (layer * E + expert) in slots at the beginning, oldest first.
    """

    def __init__(self, num_slots: int, num_experts: int, residents: Iterable[int] = ()) -> None:
        self._num_slots, self._num_experts = num_slots, num_experts
        self._order: OrderedDict[int, None] = OrderedDict.fromkeys(residents)
        self._evict()
        self.hits, self.misses = 0, 0

    def step(self, keys: Sequence[int]) -> None:
        """Serve the calls of whole layers, by the distinct keys that they use, ascending."""
        order, end = self._order, 0
        for key in keys:
            if key >= end:  # the next layer's call
                self._evict()
                end = (key // self._num_experts + 1) * self._num_experts
            if key in order:
                order.move_to_end(key)
                self.hits += 1
            else:
                order[key] = None
                self.misses += 1
        self._evict()

    def _evict(self) -> None:
        for _ in range(len(self._order) - self._num_slots):
            self._order.popitem(last=False)
