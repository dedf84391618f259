"""Pinned host memory: pages that the GPU can read, on its own NUMA node, allocated fast.

`pin_memory()` takes its pages one by one under the driver (measured: 6 s for 8 GiB); registering
pages that were touched before takes a tenth of that, and less where the pages are huge.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
TOUCHING_THREADS = 16
"""Threads that take pages: the system zeroes each, and on a virtual machine so does its host."""


class PinnedMemory:
    """Tensors in pinned memory, all given back at `close`."""

    def __init__(self) -> None:
        self._registered: dict[int, Tensor] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A pinned tensor, zero. Raises MemoryError where the machine has no more to pin."""
        tensor = untouched(shape, dtype)
        take_pages(tensor)
        self.register(tensor)
        return tensor

    def register(self, tensor: Tensor) -> None:
        """Pin the pages of a tensor that has been written."""
        error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if int(error) != 0:
            raise MemoryError(
                f"{tensor.nbytes} bytes of host memory could not be pinned ({error}); free memory "
                "or raise the limit of locked memory (ulimit -l)"
            )
        self._registered[tensor.data_ptr()] = tensor

    def release(self, tensor: Tensor) -> None:
        """Unpin one tensor, where it is pinned. Nothing may be reading it."""
        if self._registered.pop(tensor.data_ptr(), None) is not None:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())

    def close(self) -> None:
        """Unpin everything. Waits for whatever still reads it."""
        if self._registered:
            torch.cuda.synchronize()
        for tensor in list(self._registered.values()):
            self.release(tensor)


class PinnedPool:
    """One piece of pinned memory near the GPU, handed out tensor by tensor, zero."""

    def __init__(self, num_bytes: int) -> None:
        """Raises MemoryError where the machine has no more to pin."""
        memory, self._used = PinnedMemory(), 0
        with near_gpu():
            self._bytes = memory.empty((num_bytes,), torch.uint8)
        self.close = weakref.finalize(self, memory.close)
        """Unpins it. Waits for whatever still reads it."""
        self.close.atexit = False  # the process takes it along

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A part that nobody has; to torch a tensor by itself, as a compiler wants it."""
        start, self._used = self._used, self._used + math.prod(shape) * dtype.itemsize
        assert self._used <= len(self._bytes), "all of it was counted"
        part = torch.from_numpy(self._bytes.numpy()[start : self._used])
        return part.view(dtype).view(shape)


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in memory of its own that no thread has touched yet, not pinned.

    Whoever writes to it first takes the pages, several threads side by side; huge ones, where the
    system has them: they are taken and pinned hundreds at a time.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of host memory are not free ({error})") from error
    with suppress(OSError, AttributeError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def take_pages(tensor: Tensor) -> None:
    """Touch each page of a tensor of zeros once, several threads side by side."""
    first_bytes = tensor.view(-1).view(torch.uint8)[::PAGE]
    count = min(len(os.sched_getaffinity(0)), TOUCHING_THREADS, len(first_bytes))
    with ThreadPoolExecutor(max(count, 1)) as threads:
        list(threads.map(torch.Tensor.zero_, first_bytes.tensor_split(max(count, 1))))


@contextmanager
def near_gpu() -> Iterator[None]:
    """On a machine of several NUMA nodes, allocate on the node of the current GPU.

    Linux gives a page to the node of the thread that touches it first, so this thread moves there.
    """
    cores = _cores_of_gpu()
    before = os.sched_getaffinity(0) if cores else set()
    if cores & before:
        os.sched_setaffinity(0, cores & before)
    try:
        yield
    finally:
        if cores & before:
            os.sched_setaffinity(0, before)


def _cores_of_gpu() -> set[int]:
    """Cores of the GPU's NUMA node; empty on a machine of one node, or where Linux does not say."""
    if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) < 2:
        return set()
    gpu: object = torch.cuda.get_device_properties(torch.cuda.current_device())
    domain, bus, device = (getattr(gpu, f"pci_{part}_id") for part in ("domain", "bus", "device"))
    address = f"{domain:04x}:{bus:02x}:{device:02x}.0"
    listing = Path("/sys/bus/pci/devices") / address / "local_cpulist"
    return parse_cores(listing.read_text()) if listing.is_file() else set()


def parse_cores(text: str) -> set[int]:
    """The kernel's list of cores, like "0-7,16-23"."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
