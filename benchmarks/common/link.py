"""The host-to-device link: its measured bandwidth, and the share of it that a run used."""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 64 << 20
ROUNDS = 5
BURST = 512 << 20


def measure_link(expert_bytes: int, device: torch.device) -> dict[str, float] | None:
    """Bandwidth of pinned copies to the device, in bytes a second, by copy size; None on the CPU.

    CUDA events time a burst of at least 512 MiB of each size; the best of `ROUNDS` bursts counts.
    """
    if device.type != "cuda":
        return None
    sizes = {"expert": expert_bytes, "64 MiB": LARGE}
    return {name: _bandwidth(size, device) for name, size in sizes.items()}


def _bandwidth(size: int, device: torch.device) -> float:
    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    copies = max(BURST // size, 1)
    return size * copies / min(_burst_s(source, target, copies) for _ in range(ROUNDS))


def _burst_s(source: Tensor, target: Tensor, copies: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(copies):
        target.copy_(source, non_blocking=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def best(link: dict[str, float] | None) -> float | None:
    """The highest of the measured bandwidths; None without a link."""
    return None if link is None else max(link.values())


def link_efficiency(needed_bytes: float, seconds: float, bandwidth: float | None) -> float | None:
    """Share of `seconds` that the link must take for `needed_bytes` at `bandwidth` bytes a second.

    1 means that the link was the only bound. None without a link, or for no time.
    """
    if bandwidth is None or seconds <= 0:
        return None
    return needed_bytes / (bandwidth * seconds)
