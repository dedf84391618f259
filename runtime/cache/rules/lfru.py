"""LFRU: frequency over age, after vLLM's pull request 37190."""

from __future__ import annotations

import numpy as np

from runtime.cache.rules.stamped import StampedPolicy


class LFRU(StampedPolicy):
    """Evicts the lowest uses / age, where age is 1 plus the uses of the layer since the last one.

    The score of vLLM's `CachedWeightProvider` (pull request 37190), read in its source: every layer
    has a clock that ticks at each use of an expert, and uses never fade. Two things differ, because
    a vector of values does not know which experts are resident: layers share one pool of slots, and
    the count of an expert goes on when it is evicted. (`layer_lfru` has the original, simulated.)
    The experts of one call count as used at once; ages are those at the start of the step.
    """

    name = "lfru"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._uses, self._last = np.zeros((2, num_layers * num_experts))
        self._clock_L1 = np.zeros((num_layers, 1))
        self.num_experts = num_experts
        super().__init__(num_layers, num_experts)

    def _absorb(self, used: np.ndarray) -> None:
        is_used = np.zeros(len(self._uses), bool)
        is_used[used] = True
        self._uses += is_used
        self._clock_L1 += is_used.reshape(-1, self.num_experts).sum(1, keepdims=True)
        self._last[used] = self._clock_L1[used // self.num_experts, 0]

    def _revalue(self) -> None:
        age_LE = self._clock_L1 - self._last.reshape(-1, self.num_experts) + 1
        np.divide(self._uses, age_LE.reshape(-1), out=self.values)
        np.add(self._uses, 1, out=self._stamps)
