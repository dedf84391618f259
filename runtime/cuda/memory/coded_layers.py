"""Layers of experts in codes, read from their store straight into pinned memory.

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


class _Layer(NamedTuple):
    """The experts of a layer that are being read."""

    stored_EN: Tensor
    futures: list[Future[None]]


class CodedLayers:
    """Reads layers of a store, in the order in which they are asked for, a layer ahead.

    expert_blocks: of each layer. counts: experts of each layer. advance: called with the bytes of
    each expert that has been read.
    """

    def __init__(
        self,
        store: ExpertStore,
        expert_blocks: list[ExpertBlock],
        counts: list[int],
        memory: PinnedMemory,
        threads: ThreadPoolExecutor,
        advance: Callable[[int], object],
    ) -> None:
        self._store, self._memory, self._threads = store, memory, threads
        self._expert_blocks, self._counts, self._advance = expert_blocks, counts, advance
        self._begun: dict[int, _Layer] = {}

    def take(self, layer: int) -> Tensor:
        """The experts of `layer`, int16 [E, stored units], read and pinned.

        Raises what reading raised, and MemoryError where the machine has no more to pin.
        """
        self._begin(layer)
        following = layer + 1
        if following < len(self._counts) and self._expert_blocks[following].coding:
            self._begin(following)
        stored_EN, futures = self._begun.pop(layer)
        for future in futures:
            future.result()
            self._advance(2 * self._expert_blocks[layer].stored_units)
        self._memory.register(stored_EN)
        return stored_EN

    def _begin(self, layer: int) -> None:
        if layer in self._begun:
            return
        shape = self._counts[layer], self._expert_blocks[layer].stored_units
        stored_EN = untouched(shape, torch.int16)
        self._begun[layer] = _Layer(stored_EN, [])
        for expert in range(len(stored_EN)):
            future = self._threads.submit(self._read, layer, expert, stored_EN[expert])
            self._begun[layer].futures.append(future)

    def _read(self, layer: int, expert: int, stored_N: Tensor) -> None:
        self._store.read_stored(layer, expert, self._expert_blocks[layer].stored_views(stored_N))


@contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads on the cores of this one. After an error, what has not begun is left undone."""
    count = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    threads = ThreadPoolExecutor(count, thread_name_prefix="expertflow-read")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
