"""LFRU: frequency over age, after vLLM's pull request 37190."""

from __future__ import annotations

import numpy as np

from runtime.cache.forecast import Forecast
from runtime.cache.policy import DeviceRule, Policy


class LFRU(Policy):
    """Evicts the lowest uses / age, where age is 1 plus the uses of the layer since the last one.

    The score of vLLM's `CachedWeightProvider` (pull request 37190), read in its source: every layer
    has a clock that ticks at each use of an expert, and uses never fade. Two things differ, because
    a vector of values does not know which experts are resident: layers share one pool of slots, and
    the count of an expert goes on when it is evicted. (`layer_lfru` has the original, simulated.)
    The experts of one call count as used at once; ages are those at the start of the step.
    """

    name = "lfru"
    rule = DeviceRule.STAMP

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._uses_LE, self._last_LE = np.zeros((2, num_layers, num_experts))
        self._clock_L1 = np.zeros((num_layers, 1))

    def begin_step(self, forecast: Forecast | None) -> None:
        values_LE = self.values.reshape(self._last_LE.shape)
        np.divide(self._uses_LE, self._clock_L1 - self._last_LE + 1, out=values_LE)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self._clock_L1[layer] += len(experts)
        self._last_LE[layer, experts] = self._clock_L1[layer]
        self._uses_LE[layer, experts] += 1
        self.values[layer * self.num_experts + experts] = self._uses_LE[layer, experts]

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        return self.values.copy(), (self._uses_LE + 1).reshape(-1)
