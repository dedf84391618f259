"""The ledger: the record of one captured step, as the kernels write it and the host reads it.

routes [L, B * K]   counts [L, ranges, 3]   prefetched [L]   used [L]   progress [L, PREFETCHERS]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Ledger(NamedTuple):
    """The record of one step, on the host."""

    routes_LBK: np.ndarray
    num_used_L: np.ndarray
    num_fetched_L: np.ndarray
    num_away_L: np.ndarray
    """Experts that the CPU computed."""
    prefetched_L: np.ndarray
    """The expert that was chosen, -1 for none."""
    used_L: np.ndarray
    """1 where the chosen expert was then needed."""
    chunks_L: np.ndarray
    """Chunks of it that arrived in time."""


class DeviceLedger:
    """The ledger of steps of `batch` tokens on the device, one tensor; kernels write its parts."""

    def __init__(
        self, layers: int, batch: int, top_k: int, ranges: int, prefetchers: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._shape, self._prefetchers = (layers, batch, top_k), prefetchers
        self._sizes = [
            layers * batch * top_k, layers * ranges * 3, layers, layers, layers * prefetchers
        ]  # fmt: skip
        self.whole = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        routes, counts, self.prefetched, self.used, progress = self.whole.split(self._sizes)
        self.prefetched.fill_(-1)
        self.routes = routes.view(layers, batch * top_k)
        self.counts = counts.view(layers, ranges, 3)
        self.progress = progress.view(layers, prefetchers)

    def read(self, ledger: np.ndarray) -> Ledger:
        """The parts of a ledger that was copied to the host, int32."""
        routes, counts, prefetched, used, progress = np.split(ledger, np.cumsum(self._sizes)[:-1])
        layers = self._shape[0]
        used_L, fetched_L, away_L = counts.reshape(layers, -1, 3).sum(1).T
        return Ledger(
            routes.reshape(self._shape), used_L, fetched_L, away_L, prefetched, used,
            progress.reshape(layers, self._prefetchers).sum(1),
        )  # fmt: skip
