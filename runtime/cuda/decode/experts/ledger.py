"""The ledger: the record of one captured step, as the kernels write it and the host reads it.

routes [L, B * K]   counts [L, ranges, 3]   moved [L + 1, ranges, COLUMNS]

The last row of `moved` is of what was sent ahead after the last layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from runtime.cuda.kernels import transfer
from runtime.cuda.kernels.transfer import COLUMNS


class Moved(NamedTuple):
    """Experts that were sent ahead: what a step brought of them, and what became of them."""

    whole_L: np.ndarray
    """Experts that the layer used and that were all there."""
    late_L: np.ndarray
    """Experts that it used and of which a part was there."""
    lacked: int
    """Chunks that these lacked."""
    brought: int
    """Chunks that were sent ahead."""
    begun: int
    """Experts of which the first chunks were sent."""
    wasted: int
    """Chunks that were given up before their expert was used."""

    @property
    def whole(self) -> int:
        """Experts that were used and were all there."""
        return int(self.whole_L.sum())


def nothing_moved(num_layers: int) -> Moved:
    """Of a step that sends nothing ahead."""
    none_L = np.zeros(num_layers, np.int64)
    return Moved(none_L, none_L, 0, 0, 0, 0)


class Ledger(NamedTuple):
    """The record of one step, on the host."""

    routes_LBK: np.ndarray
    num_used_L: np.ndarray
    num_fetched_L: np.ndarray
    """Experts that were fetched, the rest of those that were late included."""
    num_away_L: np.ndarray
    """Experts that the CPU computed."""
    moved: Moved


class DeviceLedger:
    """The ledger of steps of `batch` tokens on the device, one tensor; kernels write its parts."""

    def __init__(
        self, layers: int, batch: int, top_k: int, ranges: int, device: torch.device
    ) -> None:
        self._shape = layers, batch, top_k
        self._sizes = [
            layers * batch * top_k, layers * ranges * 3, (layers + 1) * ranges * COLUMNS
        ]  # fmt: skip
        self.whole = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        routes, counts, moved = self.whole.split(self._sizes)
        self.routes = routes.view(layers, batch * top_k)
        self.counts = counts.view(layers, ranges, 3)
        self.moved = moved.view(layers + 1, ranges, COLUMNS)

    def read(self, ledger: np.ndarray) -> Ledger:
        """The parts of a ledger that was copied to the host, int32."""
        routes, counts, moved = np.split(ledger, np.cumsum(self._sizes)[:-1])
        layers = self._shape[0]
        used_L, fetched_L, away_L = counts.reshape(layers, -1, 3).sum(1).T
        row_L = moved.reshape(layers + 1, -1, COLUMNS).sum(1)
        return Ledger(routes.reshape(self._shape), used_L, fetched_L, away_L, _read(row_L))


def _read(moved_LC: np.ndarray) -> Moved:
    """The rows of `moved`, the last one being of no layer."""
    total_C = moved_LC.sum(0)
    return Moved(
        whole_L=moved_LC[:-1, transfer.USED.value],
        late_L=moved_LC[:-1, transfer.LATE.value],
        lacked=int(total_C[transfer.LACKED.value]),
        brought=int(total_C[transfer.BROUGHT.value]),
        begun=int(total_C[transfer.BEGUN.value]),
        wasted=int(total_C[transfer.OVERWRITTEN.value] + total_C[transfer.EVICTED_UNUSED.value]),
    )
