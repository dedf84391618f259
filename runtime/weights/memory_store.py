"""All experts of a checkpoint, held in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.weights.arena import Arena
from runtime.weights.encodings.coded import Coding, decode_expert
from runtime.weights.store import SkeletonStore


class MemoryStore(SkeletonStore):
    """A copy of all experts of another store, as that stores them; it is read once, never again.

    Afterwards the files may change, and no miss waits for a disk.
    """

    def __init__(self, store: SkeletonStore) -> None:
        super().__init__(store.meta_layers, store.layers, store.dtype)
        self.loss = store.loss
        self._coding = [store.coding(index) for index in range(len(self.layers))]
        self._experts = [
            Arena(self.stored_specs(index), layer.num_experts, torch.device("cpu"))
            for index, layer in enumerate(self.layers)
        ]
        for index, arena in enumerate(self._experts):
            for expert in range(arena.num_slots):
                store.read_stored(index, expert, arena.slot(expert))

    def coding(self, layer: int) -> Coding:
        return self._coding[layer]

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        decode_expert(self._experts[layer].slot(expert), self._coding[layer], into)

    @torch.no_grad()
    def read_stored(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        stored = self._experts[layer].slot(expert)
        for name, target in into.items():
            target.copy_(stored[name])
