"""The copies of a schedule, on the stream that copies, beside the products of the groups before.

    begin_pass  | wait_for(group), its products, has_run(group) | ... | end_pass

Nothing waits on the host, so passes can be captured. At the end of a pass the first groups of the
next one are on their way already.
"""

from __future__ import annotations

import numpy as np
import torch

from runtime.cache.expert_cache import FREE
from runtime.cuda.prefill.streaming_pool import StreamingPool
from runtime.cuda.wide.schedule import Schedule

NEVER = -1


class ExpertStream:
    """Streams experts through the slots of `pool` by `schedule`."""

    def __init__(self, pool: StreamingPool, schedule: Schedule) -> None:
        self._pool, self.schedule = pool, schedule
        self._coming = [*schedule.copies, *schedule.copies[: schedule.ahead]]
        """The copies of a pass: the last ones are the first of the next."""
        self._number = {copy.group: number for number, copy in enumerate(schedule.copies)}
        """Of the copy of each streamed group."""
        self._cache = pool.cache
        self._version = NEVER
        """Of the slot table when what stays was brought."""
        self.is_whole = False
        """Whether the last pass ran to its end, and the first groups of the next are coming. Who
        runs a captured pass says so."""
        self._next = 0
        """Of `_coming`."""
        self._arrived: dict[int, torch.cuda.Event] = {}
        """Of the groups that may be on their way, when they are there."""

    def begin_pass(self) -> None:
        """The experts that stay are in their slots, or on their way; so are the first groups."""
        if self._version != self._cache.version:
            self._bring_what_stays()
            self.is_whole = False
        if not self.is_whole:
            self._pool.copies.wait_stream(torch.cuda.current_stream(self._pool.device))
            for copy in self.schedule.copies[: self.schedule.ahead]:
                self._bring(copy.group)
        self.is_whole, self._next = False, self.schedule.ahead

    def end_pass(self) -> None:
        """All groups have run."""
        assert self._next == len(self._coming)
        self.is_whole = True

    def begin_captured(self) -> None:
        """A pass whose experts have all `settled` begins, within a graph."""
        self._pool.copies.wait_stream(torch.cuda.current_stream(self._pool.device))
        self._next = self.schedule.ahead

    def settle(self) -> None:
        """Make the current stream wait for all that is on its way."""
        torch.cuda.current_stream(self._pool.device).wait_stream(self._pool.copies)
        self._arrived.clear()

    def wait_for(self, index: int) -> None:
        """Make the current stream wait until a group is there."""
        assert self._number.get(index, NEVER) < self._next, "its copy has not begun"
        arrival = self._arrived.pop(index, None)
        if arrival is not None:
            torch.cuda.current_stream(self._pool.device).wait_event(arrival)

    def has_run(self, index: int) -> None:
        """A group's products are enqueued: others take its place."""
        due = self._next
        while due < len(self._coming) and self._coming[due].after <= index:
            due += 1
        if due > self._next:
            ran = torch.cuda.current_stream(self._pool.device).record_event()
            self._pool.copies.wait_event(ran)
            for copy in self._coming[self._next : due]:
                self._bring(copy.group)
            self._next = due

    def _bring_what_stays(self) -> None:
        """Into their slots, those that are not there yet; the table says so at once."""
        keys = self._table()
        lacking = keys != self._cache.key_of_slot
        self._pool.wait_for_copies()
        self._arrived.clear()
        self._pool.copies.wait_stream(torch.cuda.current_stream(self._pool.device))
        self._cache.adopt(keys)
        for index, group in enumerate(self.schedule.groups):
            if not group.streams and lacking[group.slot : group.slot + group.size].any():
                self._bring(index)
                self._pool.count_sent(group.layer, group.size)
        self._version = self._cache.version

    def _table(self) -> np.ndarray:
        """The key in each slot while the schedule holds."""
        keys = np.full(self.schedule.num_slots, FREE)
        for group in self.schedule.groups:
            if not group.streams:
                first = group.layer * self._cache.num_experts + group.first
                keys[group.slot : group.slot + group.size] = range(first, first + group.size)
        return keys

    def _bring(self, index: int) -> None:
        group, pool = self.schedule.groups[index], self._pool
        with torch.cuda.stream(pool.copies):
            slots_GN = pool.slots_SN[group.slot : group.slot + group.size]
            pool.send(group.layer, group.first, group.end, slots_GN)
            self._arrived[index] = pool.copies.record_event()
