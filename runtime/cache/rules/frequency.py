"""The rule of frequency: least frequently used."""

from __future__ import annotations

import numpy as np

from runtime.cache.forecast import Forecast
from runtime.cache.policy import DeviceRule, Policy


class LFU(Policy):
    """Least frequently used, with uses fading by `fade` a step."""

    name = "lfu"
    rule = DeviceRule.COUNT
    fade = 0.98

    def begin_step(self, forecast: Forecast | None) -> None:
        self.values *= self.fade

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self.values[layer * self.num_experts + experts] += 1.0
