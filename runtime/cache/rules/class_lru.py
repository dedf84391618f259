"""ClassLRU: recency within classes of frequency, as llama.cpp's cache of experts has it."""

from __future__ import annotations

import numpy as np

from runtime.cache.rules.stamped import StampedPolicy


class ClassLRU(StampedPolicy):
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
    HALF_LIFE = 128.0

    def __init__(self, num_layers: int, num_experts: int) -> None:
        keys = num_layers * num_experts
        self._crf, self._last = np.zeros((2, keys))
        self._weight = np.ones(keys)
        self._turn = np.arange(keys) / keys
        self._step = 0
        super().__init__(num_layers, num_experts)

    def _absorb(self, used: np.ndarray) -> None:
        self._crf[used] = self._next_crf[used]
        self._weight[used] = self._next_weight[used]
        self._last[used] = self._step + self._turn[used]
        self._step += 1

    def _revalue(self) -> None:
        np.subtract(self._last, self._step + 1, out=self.values)
        self.values /= self._weight
        unused_for = self._step + self._turn - self._last
        self._next_crf = 1 + self._crf * np.exp2(unused_for / -self.HALF_LIFE)
        self._next_weight = np.exp2(np.rint(np.log2(self._next_crf)))
        np.divide(self._turn - 1, self._next_weight, out=self._stamps)
