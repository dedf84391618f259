"""The contract of rules whose values change with time and with a use, and with nothing else.

A use makes of a value what is known when the step starts: its *stamp*. So all the arithmetic is
done once a step, over whole vectors; a touch only copies stamps, on the host and on a device.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from runtime.cache.forecast import Forecast
from runtime.cache.policy import DeviceRule, Policy


class StampedPolicy(Policy):
    """A policy with a value and a stamp for every key (layer * E + expert)."""

    rule = DeviceRule.STAMP

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._stamps = np.zeros_like(self.values)
        self._used: list[np.ndarray] = []
        self._revalue()

    def begin_step(self, forecast: Forecast | None) -> None:
        used = np.concatenate(self._used) if self._used else np.zeros(0, np.int64)
        self._used.clear()
        self._absorb(used)
        self._revalue()

    def touch(self, layer: int, experts: np.ndarray) -> None:
        keys = layer * self.num_experts + experts
        self.values[keys] = self._stamps[keys]
        self._used.append(keys)

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        return self.values.copy(), self._stamps.copy()

    @abstractmethod
    def _absorb(self, used: np.ndarray) -> None:
        """End a step that used these keys (int64, each at least once)."""

    @abstractmethod
    def _revalue(self) -> None:
        """Write `values` and `_stamps` of the step that starts."""
