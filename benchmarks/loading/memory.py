"""Anonymous memory of this process: now, and its peak."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path

STATUS = "/proc/self/status"


class Peak:
    """Peak of this process's anonymous memory inside the block, in bytes above its start."""

    def __enter__(self) -> Peak:
        forget_freed_memory()
        self.start = self.most = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, anonymous_bytes())

    @property
    def num_bytes(self) -> int:
        """The peak so far."""
        return self.most - self.start


def forget_freed_memory() -> None:
    """Collect garbage and return freed memory to the system: its reuse would hide allocations."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def anonymous_bytes() -> int:
    """RssAnon of this process, in bytes. Raises ValueError where the system does not tell."""
    for line in Path(STATUS).read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise ValueError("this system does not say how much anonymous memory a process has")
