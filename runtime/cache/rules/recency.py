"""Rules of recency: least recently used, and least stale."""

from __future__ import annotations

import numpy as np

from runtime.cache.forecast import Forecast
from runtime.cache.policy import DeviceRule, Policy


class LRU(Policy):
    """Least recently used; within one call, experts of lower id are older."""

    name = "lru"
    rule = DeviceRule.CLOCK

    def touch(self, layer: int, experts: np.ndarray) -> None:
        count = len(experts)
        self.values[layer * self.num_experts + experts] = np.arange(self.clock, self.clock + count)
        self.clock += count


class LeastStale(Policy):
    """Evicts what was not used for the most steps; of equals, what has its turn furthest off.

    After SpecMD's eviction by staleness (arXiv 2602.03921), as we read it.
    """

    name = "least-stale"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._last_LE = np.zeros((num_layers, num_experts))
        self._step = 0

    def begin_step(self, forecast: Forecast | None) -> None:
        self._step += 1
        num_layers = len(self._last_LE)
        turn_L1 = np.arange(num_layers)[:, None]
        self.values = (2 * num_layers * (self._last_LE + 1) - turn_L1).reshape(-1)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self._last_LE[layer, experts] = self._step
        num_layers = len(self._last_LE)
        row = slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        self.values[row] = 2 * num_layers * self._last_LE[layer] + num_layers - layer
