"""The recorder of a few steps: torch's profiler, and the engine's own times and counts."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.lanes.profile import Profile, read_profile


class Mark(NamedTuple):
    """A moment, and what the engine had counted until then."""

    at: float
    """Microseconds on the recorder's clock."""
    missed_L: np.ndarray
    """int64, experts that each layer missed or that came late."""
    fetched_bytes: int
    """Bytes that crossed the link for layers that missed them; prefetched ones are not in it."""


class HostTime(NamedTuple):
    """A time that the engine measured itself (`Stats.add_time`), in microseconds."""

    name: str
    start: float
    length: float
    is_main: bool
    """Whether in the thread that generates."""


class Recorder:
    """Records what runs within `recording`. stats: the engine's `Stats`.

    The clock is perf_counter in microseconds; the profiler's Unix time is converted to it.
    """

    def __init__(self, stats: Any, device: torch.device) -> None:
        self._stats, self._device, self._main = stats, device, threading.get_ident()
        self._origin = time.time_ns() / 1e3 - _now()
        self.marks: list[Mark] = []
        self.times: list[HostTime] = []
        self.profile = Profile()

    def mark(self) -> None:
        """Note this moment: the start, or the arrival of a token."""
        stats = self._stats
        fetched = stats.bytes_loaded - stats.bytes_prefetched
        self.marks.append(Mark(_now(), stats.misses_L + stats.late_L, fetched))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the block. On a GPU the profile is complete when it has ended."""
        stats, add_time = self._stats, self._stats.add_time

        def noting(name: str, seconds: float) -> None:
            is_main = threading.get_ident() == self._main
            length = seconds * 1e6
            self.times.append(HostTime(name, _now() - length, length, is_main))
            add_time(name, seconds)

        stats.add_time = noting
        try:
            if self._device.type == "cuda":
                with self._profiled():
                    yield
            else:
                yield
        finally:
            del stats.add_time

    @contextmanager
    def _profiled(self) -> Iterator[None]:
        """Of the GPU's activities only, to which calls of CUDA belong: operators are not timed one
        by one, so that the host is hardly slower than without it.
        """
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            yield
            torch.cuda.synchronize()  # steps that run ahead are in the profile, too
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "trace.json")
            profiler.export_chrome_trace(str(path))
            self.profile = read_profile(json.loads(path.read_text()), self._origin)


def _now() -> float:
    return time.perf_counter() * 1e6
