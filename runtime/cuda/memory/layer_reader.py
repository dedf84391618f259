"""Layers of experts read from their store straight into pinned memory, as they are stored.

Threads read the experts of a layer side by side: that sets no byte in motion twice, and takes the
pages too. Meanwhile the layer before is pinned.

    threads   | read layer 0 | read layer 1 | read layer 2 | ...
    caller                   | pin layer 0  | pin layer 1  | ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.pinned import PinnedMemory, untouched
from runtime.weights.store import ExpertStore

MOST_THREADS = 16
"""Threads that read: more do not make a disk faster."""
AHEAD = 2
"""Layers that are read beyond the one that is asked for: no thread waits for the pinning."""


class _Layer(NamedTuple):
    """The experts of a layer that are being read."""

    stored_EN: Tensor
    futures: list[Future[None]]


class LayerReader:
    """Reads layers of a store, in the order in which they are asked for, some ahead.

    The store has their blocks as they will be kept: in codes, packed, or as they are.

    counts: experts of each layer. transposed: the store hands matrices out as [in, out].
    advance: called with the bytes of each expert that was read. room: the memory of a layer, where
    there is some already.
    """

    def __init__(
        self,
        store: ExpertStore,
        expert_blocks: list[ExpertBlock],
        counts: list[int],
        memory: PinnedMemory,
        threads: ThreadPoolExecutor,
        advance: Callable[[int], object],
        *,
        transposed: bool,
        room: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._store, self._memory, self._threads = store, memory, threads
        self._room = room or self._untouched
        self._expert_blocks, self._counts, self._advance = expert_blocks, counts, advance
        self._transposed = transposed
        self._ahead = 0 if store.owns_experts else AHEAD  # those are in memory once already
        self._begun: dict[int, _Layer] = {}

    def take(self, layer: int) -> Tensor:
        """The experts of `layer`, int16 [E, stored units], read and pinned.

        All layers after it will be asked for too. Raises what reading raised, and MemoryError where
        the machine has no more to pin.
        """
        stored_EN = self.read(layer)
        self._memory.register(stored_EN)
        return stored_EN

    def read(self, layer: int) -> Tensor:
        """The same, not pinned yet."""
        for following in range(layer, min(layer + self._ahead + 1, len(self._counts))):
            self._begin(following)
        stored_EN, futures = self._begun.pop(layer)
        for future in futures:
            future.result()
            self._advance(2 * self._expert_blocks[layer].stored_units)
        return stored_EN

    def _begin(self, layer: int) -> None:
        if layer in self._begun:
            return
        stored_EN = self._room(layer)
        self._begun[layer] = _Layer(stored_EN, [])
        for expert in range(len(stored_EN)):
            future = self._threads.submit(self._read, layer, expert, stored_EN[expert])
            self._begun[layer].futures.append(future)

    def _untouched(self, layer: int) -> Tensor:
        shape = self._counts[layer], self._expert_blocks[layer].stored_units
        return untouched(shape, torch.int16)

    def _read(self, layer: int, expert: int, stored_N: Tensor) -> None:
        block = self._expert_blocks[layer]
        if block.patches:
            self._store.read_packed(layer, expert, stored_N)
            return
        views = block.stored_views(stored_N)
        if self._transposed and not block.coding:
            views = turned(views)
        self._store.read_stored(layer, expert, views)


def turned(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of one expert with their matrices transposed: views."""
    return {name: p.mT if p.dim() == 2 else p for name, p in parameters.items()}


@contextmanager
def reading_threads(store: ExpertStore) -> Iterator[ThreadPoolExecutor]:
    """Threads on the cores of this one; for tensors in memory one, since copies have their own.

    After an error, what has not begun is left undone.
    """
    cores = len(os.sched_getaffinity(0))
    count = 1 if store.owns_experts else min(cores, MOST_THREADS)
    threads = ThreadPoolExecutor(count, thread_name_prefix="expertflow-read")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
