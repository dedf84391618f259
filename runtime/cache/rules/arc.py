"""ARC: the adaptive replacement cache (Megiddo and Modha, FAST 2003)."""

from __future__ import annotations

from runtime.cache.rules.queue_cache import Queue, QueueCache, oldest


class ARC(QueueCache):
    """Two LRU lists, of experts used once and used again; the share of each adapts.

    Each list remembers what it evicted. A miss on such a ghost says that its list is too short:

        once, again              T1, T2 of the paper: resident
        ghost_once, ghost_again  B1, B2: evicted not long ago
        target                   p: the size that T1 should have
    """

    name = "arc"

    def __init__(self, num_layers: int, num_experts: int, num_slots: int) -> None:
        super().__init__(num_layers, num_experts, num_slots)
        self._once, self._again = Queue(), Queue()
        self._ghost_once, self._ghost_again = Queue(), Queue()
        self._target = 0.0

    def residents(self) -> set[int]:
        return {*self._once, *self._again}

    def _hit(self, key: int) -> bool:
        resident = self._once.pop(key, None) is not None or self._again.pop(key, None) is not None
        if resident:
            self._again[key] = 0
        return resident

    def _load(self, key: int, pinned: frozenset[int]) -> None:
        if key in self._ghost_once:
            growth = max(1.0, len(self._ghost_again) / len(self._ghost_once))
            self._target = min(float(self.num_slots), self._target + growth)
            self._replace(pinned, prefer_once=False)
            del self._ghost_once[key]
            self._again[key] = 0
        elif key in self._ghost_again:
            growth = max(1.0, len(self._ghost_once) / len(self._ghost_again))
            self._target = max(0.0, self._target - growth)
            self._replace(pinned, prefer_once=True)
            del self._ghost_again[key]
            self._again[key] = 0
        else:
            self._forget()
            self._replace(pinned, prefer_once=False)
            self._once[key] = 0

    def _forget(self) -> None:
        """Drop the oldest ghost where the lists remember as much as they may."""
        seen_once = len(self._once) + len(self._ghost_once)
        if seen_once >= self.num_slots:
            _pop_oldest(self._ghost_once)
        elif seen_once + len(self._again) + len(self._ghost_again) >= 2 * self.num_slots:
            _pop_oldest(self._ghost_again)

    def _replace(self, pinned: frozenset[int], *, prefer_once: bool) -> None:
        """Evict from the list that is longer than it should be, if no slot is free."""
        size = len(self._once)
        if size + len(self._again) < self.num_slots:
            return
        takes_once = size > self._target or (prefer_once and size == self._target)
        sides = [(self._once, self._ghost_once), (self._again, self._ghost_again)]
        for protected in (pinned, frozenset[int]()):
            for queue, ghosts in sides if takes_once else sides[::-1]:
                victim = oldest(queue, protected)
                if victim is not None:
                    del queue[victim]
                    if len(ghosts) < self.num_slots:
                        ghosts[victim] = 0
                    return


def _pop_oldest(queue: Queue) -> None:
    if queue:
        del queue[next(iter(queue))]
