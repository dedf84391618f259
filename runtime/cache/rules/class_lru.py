"""ClassLRU: recency within classes of frequency, as llama.cpp's cache of experts has it."""

from __future__ import annotations

import numpy as np

from runtime.cache.forecast import Forecast
from runtime.cache.policy import DeviceRule, Policy


class ClassLRU(Policy):
    """One LRU list per class of frequency; the victim is the oldest by age / 2 ** class.

    llama.cpp's `--moe-cache-mib` since c4fb5796, of which we have a description and not the source:
    "one LRU list per frequency class, CRF decayed with a half-life of 128 tokens, victim by
    age / 2^class". As we read it:

        crf     combined recency and frequency (Lee et al. 2001): each use adds 1, and it halves
                every 128 steps; kept when the expert is evicted
        class   log2(crf) at the last use, rounded: 0 ... 8, since crf stays below 186
        age     time since the last use, in steps: expert e of layer l has its turn (l + e / E) / L
                after the step's start
        lists   over all layers: llama.cpp shares one pool among the layers of equal shape

    Of experts of one class, the least recently used goes first, as from a list. Ages are those at
    the end of the running step, so that they never are 0, and that only a use changes a value.
    Rounding down instead, classes that fade without a use, or no classes at all (2 ** class = crf)
    change hit rates by less than 0.005 (docs/results/2026-11-29-rivals.md).
    """

    name = "class-lru"
    rule = DeviceRule.STAMP
    HALF_LIFE = 128.0

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._crf_LE, self._last_LE = np.zeros((2, num_layers, num_experts))
        self._weight_LE = np.ones((num_layers, num_experts))
        turns = np.arange(num_layers * num_experts) / (num_layers * num_experts)
        self._turn_LE = turns.reshape(num_layers, num_experts)
        self._step = 0

    def begin_step(self, forecast: Forecast | None) -> None:
        self._step += 1
        values_LE = self.values.reshape(self._last_LE.shape)
        np.subtract(self._last_LE, self._step + 1, out=values_LE)
        values_LE /= self._weight_LE

    def touch(self, layer: int, experts: np.ndarray) -> None:
        now = self._step + self._turn_LE[layer, experts]
        crf = self._used(self._crf_LE[layer, experts], self._last_LE[layer, experts], now)
        weight = _class_weight(crf)
        self._crf_LE[layer, experts], self._last_LE[layer, experts] = crf, now
        self._weight_LE[layer, experts] = weight
        self.values[layer * self.num_experts + experts] = (now - self._step - 1) / weight

    def _used(self, crf: np.ndarray, last: np.ndarray, now: np.ndarray) -> np.ndarray:
        """The combined recency and frequency after a use now."""
        after: np.ndarray = 1 + crf * np.exp2((last - now) / self.HALF_LIFE)
        return after

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        crf_LE = self._used(self._crf_LE, self._last_LE, self._step + self._turn_LE)
        return self.values.copy(), ((self._turn_LE - 1) / _class_weight(crf_LE)).reshape(-1)


def _class_weight(crf: np.ndarray) -> np.ndarray:
    """2 ** class."""
    weight: np.ndarray = np.exp2(np.rint(np.log2(crf)))
    return weight
