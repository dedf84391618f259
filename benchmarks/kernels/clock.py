"""Times of launches, in CUDA graphs so that launching does not count."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
import triton


class Clock:
    """Times launches on `device`, `repeats` of them together."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def _seconds(self, launch: Callable[[], Any]) -> float:
        """Seconds of one launch; infinite if the kernel needs more resources than the GPU has."""
        try:
            launch()
        except triton.runtime.errors.OutOfResources:
            return float("inf")
        if self._device.type != "cuda":
            start = time.perf_counter()
            launch()
            return time.perf_counter() - start
        return self._graphed(launch)

    def _graphed(self, launch: Callable[[], Any]) -> float:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(self._repeats):
                launch()
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._repeats


def in_turn(launch: Callable[[Any], Any], arguments: Sequence[Any]) -> Callable[[], Any]:
    """A function that launches with the next arguments at each call, round and round."""
    turns = cycle(arguments)
    return lambda: launch(next(turns))
