"""Arms of `benchmarks.loading.pinning`: ways of experts to pinned memory, each in a process."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.loading.memory import Peak
from benchmarks.loading.stopwatch import timed

ARMS = ("one by one", "checkpoint", "packed", "shared")
"""As before there were threads; packed by the GPU while threads read; packed ones read by them; the
same, into memory that processes share: the first load reads, the others find it."""
READ_ONLY_SUPPORTED = 113
"""CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED"""
READ_ONLY = 8
"""cudaHostRegisterReadOnly"""
MAPPED_BYTES = 1 << 30


def measure(arm: str, folder: Path, rounds: int, device: str) -> dict[str, Any]:
    """Seconds and bytes of each round, and what was found about the last tier."""
    import torch

    from runtime.weights.source import from_path

    start = time.perf_counter()
    shared = arm == ARMS[3]
    name = "packed" if shared or arm == ARMS[2] else "hub"
    source = from_path(folder / name, None, "auto", shared=shared)
    values: dict[str, Any] = {"model_s": round(time.perf_counter() - start, 2), "rounds": []}
    torch.zeros(1, device=device)
    kept = []
    for number in range(rounds):
        with one_by_one() if arm == ARMS[0] else nullcontext(), Peak() as peak:
            start = time.perf_counter()
            with timed(parts()) as seconds:
                tier = tier_of(source, torch.device(device))
            took = time.perf_counter() - start
        values["rounds"].append({"s": took, "peak": peak.num_bytes} | seconds)
        if number == rounds - 1:
            values |= facts_of(tier, arm, folder, device)
        if shared:
            kept.append(tier)
        else:
            tier.close()
    for tier in kept:
        tier.close()
    return values


def parts() -> dict[str, tuple[Any, str]]:
    """The functions whose time is taken: each one's own work, nothing twice."""
    from runtime.cuda.memory import pinned
    from runtime.weights.files import WatchedFile
    from runtime.weights.packed import block_layout
    from runtime.weights.prepared.store import PreparedStore

    return {
        "read": (WatchedFile, "_fill"),
        "check": (PreparedStore, "_require_intact"),
        "pack": (block_layout, "pack"),
        "take pages": (pinned, "take_pages"),
        "register": (pinned.PinnedMemory, "register"),
    }


def tier_of(source: Any, device: Any) -> Any:
    """The host tier, as the CUDA backend makes it."""
    from runtime.cuda.memory.kernel_layout import KernelLayout, common_layout
    from runtime.cuda.memory.pinned_experts import host_tier

    layout = common_layout(source)
    assert isinstance(layout, KernelLayout), layout
    return host_tier(source, layout, device)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Read, send, pack and bring back each expert before the next, into memory that is zeroed and
    pinned first: as all versions did until there were threads.
    """
    from unittest.mock import patch

    import torch

    from runtime.cuda.memory.layer_packer import LayerPacker
    from runtime.cuda.memory.pinned import PinnedMemory, untouched

    def empty(memory: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        tensor = untouched(shape, dtype)
        tensor.zero_()
        memory.register(tensor)
        return tensor

    def take(packer: Any, layer: int, block: Any) -> Any:
        shape = packer._counts[layer], block.stored_units
        stored_EN = packer._memory.empty(shape, torch.int16)
        block_N = torch.zeros(block.units, dtype=torch.int16, device=packer._device)
        for expert in range(shape[0]):
            packer._store.read(layer, expert, block.views(block_N))
            stored_EN[expert].copy_(block.store(block_N))
        return stored_EN

    with patch.object(PinnedMemory, "empty", empty), patch.object(LayerPacker, "take", take):
        yield


def facts_of(tier: Any, arm: str, folder: Path, device: str) -> dict[str, Any]:
    """Of the pinned memory: its speed, and whether packed blocks are the checkpoint's."""
    found: dict[str, Any] = {"pinned_bytes": sum(layer.nbytes for layer in tier.layers)}
    found["link_gb_s"] = round(link_speed(tier.layers[-1], device), 1)
    if arm in ARMS[2:]:
        start = time.perf_counter()
        found["equal_experts"] = equal_experts(tier, folder / "hub", device)
        found["compare_s"] = round(time.perf_counter() - start, 2)
        if device != "cpu":
            found["mapped"] = map_file(folder / "packed" / "experts.bin", device)
    return found


def link_speed(layer_EN: Any, device: str) -> float:
    """GB/s of the copy engine out of a pinned layer."""
    import torch

    landing = torch.empty_like(layer_EN, device=device)
    landing.copy_(layer_EN, non_blocking=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        landing.copy_(layer_EN, non_blocking=True)
    torch.cuda.synchronize()
    return float(3 * layer_EN.nbytes / (time.perf_counter() - start) / 1e9)


def equal_experts(tier: Any, directory: Path, device: str) -> int:
    """Compare each expert, unpacked again on the device, with the checkpoint's.

    Returns their number. Raises ValueError, naming the expert, for one that differs.
    """
    import torch

    from runtime.cuda.memory.layer_packer import LayerPacker
    from runtime.cuda.memory.layer_reader import reading_threads
    from runtime.cuda.memory.pinned import PinnedMemory
    from runtime.weights.source import from_path

    store = from_path(directory, None, "auto").store
    memory, counts = PinnedMemory(), [len(layer_EN) for layer_EN in tier.layers]
    with reading_threads(store) as threads, closing(memory):
        packer = LayerPacker(
            store, tier.expert_blocks[0].packed(0), counts, torch.device(device), memory, threads,
            lambda _: None, transposed=False,
        )  # fmt: skip
        with closing(packer):
            for layer in range(len(counts)):
                for expert, block_N in enumerate(packer.blocks(layer)):
                    if not torch.equal(tier._on_device(layer, expert), block_N):
                        raise ValueError(f"expert {expert} of layer {layer} differs")
    return sum(counts)


def map_file(path: Path, device: str) -> dict[str, float]:
    """Whether pages of a mapped file can be registered without a copy, and how fast."""
    import numpy as np
    import torch

    driver = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_int(-1)
    driver.cuDeviceGetAttribute(ctypes.byref(value), READ_ONLY_SUPPORTED, 0)
    size = min(MAPPED_BYTES, path.stat().st_size)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    place = np.frombuffer(pages, dtype=np.uint8)
    int(place[:: mmap.PAGESIZE].sum())  # touch
    start = time.perf_counter()
    error = torch.cuda.cudart().cudaHostRegister(place.ctypes.data, size, READ_ONLY)
    found: dict[str, float] = {
        "read_only_supported": value.value,
        "error": int(error),
        "bytes": size,
    }
    if int(error) == 0:
        found["register_s"] = round(time.perf_counter() - start, 3)
        found["link_gb_s"] = round(link_speed(torch.from_numpy(place), device), 1)
        torch.cuda.cudart().cudaHostUnregister(place.ctypes.data)
    return found
