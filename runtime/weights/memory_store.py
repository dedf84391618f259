"""All experts of a checkpoint, held in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.weights.arena import Arena
from runtime.weights.store import SkeletonStore


class MemoryStore(SkeletonStore):
    """A copy of all experts of another store, which is read once and never again.

    Afterwards the files may change, and no miss waits for a disk or a conversion.
    """

    def __init__(self, store: SkeletonStore) -> None:
        super().__init__(store.meta_layers, store.layers, store.dtype)
        self.loss = store.loss
        self._experts = [
            Arena(self.specs(index), layer.num_experts, torch.device("cpu"))
            for index, layer in enumerate(self.layers)
        ]
        for index, arena in enumerate(self._experts):
            for expert in range(arena.num_slots):
                store.read(index, expert, arena.slot(expert))

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        parameters = self._experts[layer].slot(expert)
        for name, target in into.items():
            target.copy_(parameters[name])
