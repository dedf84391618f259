"""Small numbers between host and device, through pinned memory: nothing waits but who must know."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def told(numbers: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy numbers to the host. Who calls the result waits for them."""
    is_gpu = numbers.device.type == "cuda"
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=is_gpu)
    host.copy_(numbers, non_blocking=True)
    arrival = torch.cuda.current_stream(numbers.device).record_event()

    def wait() -> np.ndarray:
        arrival.synchronize()
        return host.numpy()

    return wait


def on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A copy of numbers on the device, ordered with what its current stream does."""
    host = torch.empty(numbers.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
    host.numpy()[...] = numbers
    return host.to(device, non_blocking=True)
