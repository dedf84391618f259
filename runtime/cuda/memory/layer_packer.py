"""Layers of experts that the device packs, while threads read the experts to come.

    threads   | read into pads ............................................
    caller         | to the device, pack, to the layer's memory | ..., next expert
    a thread  | take and pin the memory of layer 0 | of layer 1 | ...

A pad is pinned memory for one expert as the store has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.layer_reader import turned
from runtime.cuda.memory.pinned import PinnedMemory
from runtime.weights.store import ExpertStore

PAD_BYTES = 512 << 20
"""Most bytes of all pads."""
MOST_PADS = 32


class _Reading(NamedTuple):
    """An expert that is being read."""

    key: tuple[int, int]
    """Layer and expert."""
    pad_N: Tensor
    future: Future[None]


class LayerPacker:
    """Packs layers of a store, in the order in which they are asked for.

    plain: the blocks of all experts, unpacked. counts: experts of each layer. transposed: the store
    hands matrices out as [in, out]. advance: called with the bytes of each expert that was packed.
    """

    def __init__(
        self,
        store: ExpertStore,
        plain: ExpertBlock,
        counts: list[int],
        device: torch.device,
        memory: PinnedMemory,
        threads: ThreadPoolExecutor,
        advance: Callable[[int], object],
        *,
        transposed: bool,
    ) -> None:
        self._store, self._plain, self._counts = store, plain, counts
        self._device, self._memory, self._threads = device, memory, threads
        self._advance, self._transposed = advance, transposed
        self._pads: Tensor | None = None
        self._readings: deque[_Reading] = deque()
        self._to_read: Iterator[tuple[int, int]] = iter(())
        self._pinning = _pinning_thread(device)
        self._ahead: Future[Tensor] | None = None

    def take(self, layer: int, block: ExpertBlock) -> Tensor | None:
        """The experts of `layer` as `block` stores them, int16 [E, stored units], pinned.

        None where a chunk has no room for its patches. Raises what reading raised, and MemoryError
        where the machine has no more to pin.
        """
        stored_EN = self._room(layer, block)
        for expert, block_N in enumerate(self.blocks(layer)):
            stored_N = block.store(block_N)
            if stored_N is None:
                torch.cuda.synchronize()  # the last copy into them
                self._memory.release(stored_EN)
                return None
            stored_EN[expert].copy_(stored_N, non_blocking=True)
            self._advance(2 * self._plain.units)
        torch.cuda.synchronize()
        return stored_EN

    def blocks(self, layer: int) -> Iterator[Tensor]:
        """The layer's blocks, one after the other in the same device memory, int16 [units]."""
        if not self._readings or self._readings[0].key != (layer, 0):
            self._begin_at(layer)
        block_N = torch.zeros(self._plain.units, dtype=torch.int16, device=self._device)
        for _ in range(self._counts[layer]):
            reading = self._readings.popleft()
            reading.future.result()
            block_N.copy_(reading.pad_N, non_blocking=True)
            arrived = torch.cuda.current_stream(self._device).record_event()
            yield block_N
            arrived.synchronize()
            self._read_into(reading.pad_N)

    def close(self) -> None:
        """End the reading, and free the pads."""
        self._stop_reading()
        self._pinning.shutdown(cancel_futures=True)
        with suppress(Exception):  # of memory that nobody asked for
            if self._ahead is not None:
                self._memory.release(self._ahead.result())
        if self._pads is not None:
            self._memory.release(self._pads)

    # ------------------------------------------------------------------ reading

    def _begin_at(self, layer: int) -> None:
        """Read from the first expert of `layer` on."""
        self._stop_reading()
        if self._pads is None:
            fitting = PAD_BYTES // (2 * self._plain.units)
            num_pads = max(2, min(fitting, MOST_PADS, sum(self._counts)))
            self._pads = self._memory.empty((num_pads, self._plain.units), torch.int16)
        keys = [(at, e) for at in range(layer, len(self._counts)) for e in range(self._counts[at])]
        self._to_read = iter(keys)
        for pad_N in self._pads:
            self._read_into(pad_N)

    def _read_into(self, pad_N: Tensor) -> None:
        """Begin to read the next expert."""
        key = next(self._to_read, None)
        if key is not None:
            self._readings.append(
                _Reading(key, pad_N, self._threads.submit(self._read, key, pad_N))
            )

    def _read(self, key: tuple[int, int], pad_N: Tensor) -> None:
        views = self._plain.views(pad_N)
        self._store.read_stored(*key, turned(views) if self._transposed else views)

    def _stop_reading(self) -> None:
        """Leave off what is being read; nothing is on its way to the device after it."""
        for reading in self._readings:
            reading.future.cancel()
        wait([reading.future for reading in self._readings])
        self._readings.clear()
        torch.cuda.synchronize()

    # ------------------------------------------------------------------ memory

    def _room(self, layer: int, block: ExpertBlock) -> Tensor:
        """Pinned memory for a layer. That of the next is begun."""
        shapes = [(count, block.stored_units) for count in self._counts[layer : layer + 2]]
        ahead, self._ahead = self._ahead, None
        room_EN = None if ahead is None else ahead.result()
        if room_EN is None or tuple(room_EN.shape) != shapes[0]:
            if room_EN is not None:
                self._memory.release(room_EN)
            room_EN = self._memory.empty(shapes[0], torch.int16)
        if len(shapes) > 1:
            self._ahead = self._pinning.submit(self._memory.empty, shapes[1], torch.int16)
        return room_EN


def _pinning_thread(device: torch.device) -> ThreadPoolExecutor:
    """A thread that pins memory in the context that this one uses."""
    if device.type != "cuda":
        return ThreadPoolExecutor(1)
    current = torch.cuda.current_device()
    return ThreadPoolExecutor(1, "expertflow-pin", torch.cuda.set_device, (current,))
