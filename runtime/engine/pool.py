"""A pool of slots: it loads what a layer's call needs and hands out the parameters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from runtime.cache.expert_cache import ExpertCache, Lookup
from runtime.cache.policy import Policy
from runtime.cache.stats import Stats
from runtime.weights.arena import Arena, Specs, expert_bytes
from runtime.weights.source import Source
from runtime.weights.store import ExpertStore


class Pool:
    """The slots for all layers whose experts have the shape `specs`.

    loaded_bytes: bytes of an expert as the store has it, which decodes it into a slot.
    """

    def __init__(
        self,
        specs: Specs,
        num_slots: int,
        device: torch.device,
        store: ExpertStore,
        policy: Policy,
        stats: Stats,
        loaded_bytes: int,
    ) -> None:
        self.arena = Arena(specs, num_slots, device)
        self.cache = ExpertCache(stats.num_layers, stats.num_experts, num_slots, policy)
        self._store = store
        self._stats = stats
        self._loaded_bytes = loaded_bytes

    def serve(self, layer: int, experts: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield each of the distinct `experts` (ascending) of `layer` with its parameters.

        An expert's parameters are good until the next one is asked for.
        """
        for wave, slots in self.waves(layer, experts):
            for expert, slot in zip(wave, slots, strict=True):
                yield expert, self.arena.slot(slot)

    def waves(self, layer: int, experts: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the distinct `experts` (ascending) of `layer`, as many at a time as there is room
        for, with their slots, which are good until the next are asked for.

        After an error or an interrupt the cache starts empty: an expert that did not arrive is
        never taken for resident.
        """
        try:
            for lookup in self.cache.waves(layer, np.array(experts, np.int64)):
                self._load(layer, lookup)
                self._stats.count(layer, lookup, self._loaded_bytes)
                yield lookup.experts.tolist(), lookup.slots.tolist()
        except GeneratorExit:  # the caller stopped: whatever is resident has arrived
            raise
        except BaseException:
            self.cache.clear()
            raise

    def _load(self, layer: int, lookup: Lookup) -> None:
        with self._stats.timer("load"):
            for i in np.flatnonzero(lookup.missed):
                into = self.arena.slot(int(lookup.slots[i]))
                self._store.read(layer, int(lookup.experts[i]), into)

    def close(self) -> None:
        """Free the slots; nothing is resident any more."""
        self.cache.clear()
        self.arena.close()


def build_pools(
    source: Source, slots: list[int], device: torch.device, policy: Policy, stats: Stats
) -> list[Pool]:
    """The pool of each layer; layers of one expert shape share theirs."""
    pools: dict[int, Pool] = {}
    for group, num_slots in zip(source.groups, slots, strict=True):
        stored = expert_bytes(group.stored_specs)
        pool = Pool(group.specs, num_slots, device, source.store, policy, stats, stored)
        pools |= dict.fromkeys(group.layers, pool)
    return [pools[layer] for layer in range(len(source.layers))]
