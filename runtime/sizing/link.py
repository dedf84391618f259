"""The bandwidth between the host tier and the slots, measured."""

from __future__ import annotations

import statistics
import time

import torch

TOTAL = 512 << 20
REPEATS = 5


def measure_link(device: torch.device, block_bytes: int) -> float:
    """Bytes a second at which blocks of an expert's size reach slots on `device`.

    From pinned memory to a GPU, from memory to memory on a CPU; the median of five rounds over
    512 MiB, far more than a processor's caches hold.
    """
    num_blocks = max(1, TOTAL // block_bytes)
    host = torch.ones(num_blocks, block_bytes, dtype=torch.uint8)
    if device.type == "cuda":
        host = host.pin_memory()
    slots = torch.zeros(max(1, num_blocks // 8), block_bytes, dtype=torch.uint8, device=device)
    rounds = [_round(host, slots) for _ in range(REPEATS + 1)][1:]
    return host.numel() / statistics.median(rounds)


def _round(host: torch.Tensor, slots: torch.Tensor) -> float:
    start = time.perf_counter()
    for index, block in enumerate(host):
        slots[index % len(slots)].copy_(block, non_blocking=True)
    if slots.device.type == "cuda":
        torch.cuda.synchronize(slots.device)
    return time.perf_counter() - start
