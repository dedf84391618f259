"""Order between the threads and streams that use one engine on a GPU, and torch's global switches.

Every thread has a current stream and a current device of its own. What the last turn enqueued may
still be running out of the slots when the next turn begins on another stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


class StreamOrder:
    """Makes each turn's stream wait for the stream of the turn before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The device is current within the block, and its stream comes after the last turn's."""
        is_gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if is_gpu else nullcontext():
            self.follow()
            try:
                yield
            finally:
                self._last = torch.cuda.current_stream(self._device)

    def follow(self) -> None:
        """Make the current stream, if it is another one than before, wait for that one."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream


class CudnnAttention:
    """The process's switch for attention by cuDNN, which is off while any engine wants it off."""

    def __init__(self) -> None:
        self._lock, self._num_off, self._was_on = threading.Lock(), 0, False

    def turn_off(self) -> None:
        """Leave cuDNN alone until `turn_back` was called as often."""
        with self._lock:
            if not self._num_off:
                self._was_on = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._num_off += 1

    def turn_back(self) -> None:
        """Undo one `turn_off`."""
        with self._lock:
            self._num_off -= 1
            if not self._num_off:
                torch.backends.cuda.enable_cudnn_sdp(self._was_on)


CUDNN_ATTENTION = CudnnAttention()
"""All engines of a process share it, as they share the switch."""
