"""A measurement of the bandwidth between the host tier and the slots."""

from __future__ import annotations

import statistics
import time

import torch

TOTAL_BYTES = 512 << 20
NUM_ROUNDS = 5


def measure_link(device: torch.device, block_bytes: int) -> float:
    """Bytes a second at which blocks of an expert's size reach slots on `device`.

    The copies are host-to-device from pinned memory on a GPU, and memory to memory on a CPU.
    Returns the median of five rounds over 512 MiB, far more than the caches of a processor hold.
    """
    num_blocks = max(1, TOTAL_BYTES // block_bytes)
    host = torch.ones(num_blocks, block_bytes, dtype=torch.uint8)
    if device.type == "cuda":
        host = host.pin_memory()
    slots = torch.zeros(max(1, num_blocks // 8), block_bytes, dtype=torch.uint8, device=device)
    _copy_all(host, slots)  # the first round warms up
    seconds = [_copy_all(host, slots) for _ in range(NUM_ROUNDS)]
    return host.numel() / statistics.median(seconds)


def _copy_all(host: torch.Tensor, slots: torch.Tensor) -> float:
    """Copy all blocks into the slots in turn. Returns the seconds that it took."""
    start = time.perf_counter()
    for index, block in enumerate(host):
        slots[index % len(slots)].copy_(block, non_blocking=True)
    if slots.device.type == "cuda":
        torch.cuda.synchronize(slots.device)
    return time.perf_counter() - start
