"""Reuse: expected next use by how often experts were used lately, and by when their layer runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.cache.forecast import Forecast
from runtime.cache.policy import DeviceRule, Policy

DISCOUNT = 0.875
"""Worth of a use a step away, of one now."""
FADES = 0.75, 0.984375
"""Fading of the recent and of the usual mean of uses, each time that the layer runs."""
RECENT = 0.25
"""Weight of the recent mean."""
UNSEEN = 0.12
"""Both means of an expert before its layer first runs."""


class Reuse(Policy):
    """Predicted reuse without a prediction: the value is the expected discounted next use.

    Layers run in a cycle. With q the chance that a step uses an expert, G = DISCOUNT and
    g = G ** (1 / L), the expectation of G to the power of the steps until its next use is

        v(l, e) = g^l * q / (1 - (1 - q) * G)         while layer l of this step is still to run
        v(l, e) = G * g^l * q / (1 - (1 - q) * G)     once it ran

    if steps are independent. q is a mean of two exponential means over the layer's runs, this one
    included: of what was used just now, and of what the text uses anyway. So recency, frequency and
    the cycle are one value. Where a pass uses all experts alike (a long prompt, many sequences),
    the layers that ran last go first, and what is needed soonest stays; least recently used would
    drop each layer just before its turn.

    The constants are exact in float32, as which a kernel's constants are compiled.
    """

    name = "reuse"
    rule = DeviceRule.CYCLE

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._means = np.full((2, len(self.values)), UNSEEN)
        self._fades = np.array(FADES)[:, None]
        layers = np.repeat(np.arange(num_layers), num_experts)
        self._discounts: np.ndarray = np.power(DISCOUNT, layers / num_layers)
        self._revalue(slice(None), 1.0)

    def begin_step(self, forecast: Forecast | None) -> None:
        self._revalue(slice(None), 1.0)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        first = layer * self.num_experts
        row = slice(first, first + self.num_experts)
        self._means[:, row] *= self._fades
        self._means[:, first + experts] += 1 - self._fades
        self._revalue(row, DISCOUNT)

    def touch_layers(self, used_LE: np.ndarray) -> None:
        self._means *= self._fades
        self._means[:, used_LE.reshape(-1)] += 1 - self._fades
        self._revalue(slice(None), DISCOUNT)

    def _revalue(self, keys: slice, discount: float) -> None:
        recent, usual = self._means[:, keys]
        chance = RECENT * recent + (1 - RECENT) * usual
        expected = chance / (1 - (1 - chance) * DISCOUNT)
        self.values[keys] = expected * self._discounts[keys] * discount

    def device_state(self) -> tuple[np.ndarray, Sequence[np.ndarray]]:
        return self._discounts, tuple(self._means)

    def resume(self, values: np.ndarray, clock: int, table: np.ndarray) -> None:
        self._means[:] = table
        self._revalue(slice(None), DISCOUNT)
