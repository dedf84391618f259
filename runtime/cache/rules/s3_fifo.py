"""S3-FIFO: three queues, in order of arrival (Yang et al., SOSP 2023)."""

from __future__ import annotations

from runtime.cache.rules.queue_cache import Queue, QueueCache, oldest


class S3FIFO(QueueCache):
    """A small queue for the new, a main queue for the proven, and a memory of what was evicted.

    A new expert enters the small queue, a tenth of the slots. At its end it moves on to the main
    queue if it was used more than once since, else it is evicted and remembered. A remembered one
    enters the main queue at once. At the main queue's end an expert that was used stays for another
    round. Uses count up to 3.
    """

    name = "s3-fifo"
    SMALL = 0.1
    MOST_USES = 3

    def __init__(self, num_layers: int, num_experts: int, num_slots: int) -> None:
        super().__init__(num_layers, num_experts, num_slots)
        self._small, self._main, self._ghosts = Queue(), Queue(), Queue()
        self._small_size = max(round(self.SMALL * num_slots), 1)

    def residents(self) -> set[int]:
        return {*self._small, *self._main}

    def _hit(self, key: int) -> bool:
        for queue in (self._small, self._main):
            if key in queue:
                queue[key] = min(queue[key] + 1, self.MOST_USES)
                return True
        return False

    def _load(self, key: int, pinned: frozenset[int]) -> None:
        if len(self._small) + len(self._main) >= self.num_slots:
            self._evict(pinned)
        queue = self._small if self._ghosts.pop(key, None) is None else self._main
        queue[key] = 0

    def _evict(self, pinned: frozenset[int]) -> None:
        crowded = len(self._small) >= self._small_size
        if (crowded and self._evict_small(pinned)) or self._evict_main(pinned):
            return
        if not self._evict_small(pinned):  # the call needs all residents
            queue = self._small or self._main
            del queue[next(iter(queue))]

    def _evict_small(self, pinned: frozenset[int]) -> bool:
        """Evict the oldest of the small queue that was not used again; those before it move on."""
        for key, uses in list(self._small.items()):
            if uses > 1:
                del self._small[key]
                self._main[key] = 0
            elif key not in pinned:
                del self._small[key]
                self._remember(key)
                return True
        return False

    def _evict_main(self, pinned: frozenset[int]) -> bool:
        """Evict the oldest of the main queue that has no uses left; those before it lose one."""
        while (key := oldest(self._main, pinned)) is not None:
            uses = self._main.pop(key)
            if not uses:
                return True
            self._main[key] = uses - 1
        return False

    def _remember(self, key: int) -> None:
        self._ghosts[key] = 0
        if len(self._ghosts) > self.num_slots - self._small_size:
            del self._ghosts[next(iter(self._ghosts))]
