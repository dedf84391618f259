"""LFRU as vLLM's pull request 37190 has it: a cache of its own for every layer."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.cache.rules.queue_cache import QueueCache


@dataclass
class _Entry:
    """A resident expert: its uses since it was loaded, and the layer's clock at the last one."""

    uses: int
    last: int


class LayerLFRU(QueueCache):
    """Per layer, evicts the lowest uses / (clock - last use + 1).

    Read in the source of `CachedWeightProvider`: the clock of a layer ticks at each use, and an
    expert that is loaded starts at one use. Each layer has its own share of the slots, which makes
    it a weaker cache than one pool. The original may evict what the running call still needs (a
    defect that its reviewers found); this one does not.
    """

    name = "lfru-layers"

    def __init__(self, num_layers: int, num_experts: int, num_slots: int) -> None:
        super().__init__(num_layers, num_experts, num_slots)
        share, rest = divmod(num_slots, num_layers)
        self._sizes = [share + (layer < rest) for layer in range(num_layers)]
        self._entries: list[dict[int, _Entry]] = [{} for _ in range(num_layers)]
        self._clocks = [0] * num_layers

    def residents(self) -> set[int]:
        return {key for entries in self._entries for key in entries}

    def _hit(self, key: int) -> bool:
        layer = key // self.num_experts
        entry = self._entries[layer].get(key)
        if entry is not None:
            self._clocks[layer] += 1
            entry.uses, entry.last = entry.uses + 1, self._clocks[layer]
        return entry is not None

    def _load(self, key: int, pinned: frozenset[int]) -> None:
        layer = key // self.num_experts
        entries, clock = self._entries[layer], self._clocks[layer]
        if not self._sizes[layer]:
            return
        if len(entries) >= self._sizes[layer]:
            victims = [other for other in entries if other not in pinned] or list(entries)
            del entries[min(victims, key=lambda k: entries[k].uses / (clock - entries[k].last + 1))]
        self._clocks[layer] += 1
        entries[key] = _Entry(1, self._clocks[layer])
