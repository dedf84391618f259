"""The experts calls of a captured step of many rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from routing.layers import Routes
from runtime.cuda.decode.experts.ledger import Ledger, nothing_moved
from runtime.cuda.prefill.grouped_experts import GroupedExperts


class WideCall:
    """The experts of captured steps of `batch` tokens, as `grouped` runs those of many. The ledger
    has their routes alone.
    """

    prefetches = False

    def __init__(self, grouped: GroupedExperts, num_layers: int, batch: int, top_k: int) -> None:
        self._grouped, self._shape = grouped, (num_layers, batch, top_k)
        self._routes_LBK = torch.zeros(self._shape, dtype=torch.int32, device=grouped.device)
        self._work = grouped.work_of(batch * top_k)

    @property
    def ledger(self) -> Tensor:
        return self._routes_LBK.view(-1)

    def read(self, ledger: np.ndarray) -> Ledger:
        """A ledger that was copied to the host, int32."""
        routes_LBK = ledger.reshape(self._shape)
        fetched_L = np.zeros(len(routes_LBK), np.int64)
        return Ledger(routes_LBK, fetched_L, fetched_L, fetched_L, nothing_moved(len(routes_LBK)))

    def begin_step(self) -> None:
        """Once a step, before its first layer."""
        self._grouped.begin_captured()

    def end_step(self) -> None:
        """Once a step, after all else."""
        self._grouped.end_captured()

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Experts `ids` (int64 [B, K], others are no expert) of x [B, H]: [B, H]."""
        self._routes_LBK[layer].copy_(ids)
        routes = Routes(ids.contiguous(), weights.contiguous())
        return self._grouped.run_captured(layer, x.contiguous(), routes, self._work)
