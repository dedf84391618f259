"""The contract of a cache policy: one value for every expert; the cache evicts the lowest.

A policy is data, not code in the hot path: `values` is one float64 vector over the keys
(layer * E + expert), updated where the routes become known. Policies differ in nothing else, so a
device can evaluate any of them: by a rule of its own, or from a table that the host computes.

    DeviceRule   on the device                               values change
    CLOCK        a counter, written to each used expert      at every touch
    COUNT        uses, fading by `fade` a step               at every touch and step
    TABLE        `table()`: before and after each layer ran  when the host writes a new table
    STAMP        `table()`: as it is, and once it is used    at every touch; at a new table
    CYCLE        two means of uses, and when layers run      at every touch
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import ClassVar

import numpy as np

from routing.topology import NO_EXPERT
from runtime.cache.forecast import Forecast


class DeviceRule(Enum):
    """A way for a device to evaluate a policy without the host."""

    CLOCK = "clock"
    COUNT = "count"
    TABLE = "table"
    STAMP = "stamp"
    CYCLE = "cycle"

    @property
    def is_from_host(self) -> bool:
        """Whether the host computes the values of every step."""
        return self in (DeviceRule.TABLE, DeviceRule.STAMP)


class Policy(ABC):
    """Produces `values`, float64 [L * E]: how much each expert is worth keeping."""

    name: ClassVar[str]
    needs_forecast: ClassVar[bool] = False
    rule: ClassVar[DeviceRule] = DeviceRule.TABLE
    fade: ClassVar[float] = 1.0
    """Under COUNT: the factor of all values at the start of a step."""
    clock: int = 0
    """Under CLOCK: the value of the next use."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        self.values = np.zeros(num_layers * num_experts)

    def begin_step(self, forecast: Forecast | None) -> None:  # noqa: B027 - most need nothing
        """A forward pass is about to start; `forecast` is None where there is no prediction."""

    def revise(self, forecast: Forecast) -> None:  # noqa: B027 - most need nothing
        """Take a better forecast of the running step."""

    def reveal(self, layer: int, probability_E: np.ndarray) -> None:  # noqa: B027 - most do not ask
        """Take the probabilities of use of a layer that is still to run in this step."""

    @abstractmethod
    def touch(self, layer: int, experts: np.ndarray) -> None:
        """`layer` is about to use these distinct experts (int64 [N])."""

    def touch_layers(self, used_LE: np.ndarray) -> None:
        """Touch the experts of a whole step, layer by layer. used_LE: bool, those that it used."""
        for layer, used_E in enumerate(used_LE):
            self.touch(layer, np.flatnonzero(used_E))

    def touch_routes(self, routes: Iterable[np.ndarray]) -> None:
        """Touch the experts of a whole step: those each layer used (int, any shape; NO_EXPERT for
        none).
        """
        for layer, experts in enumerate(routes):
            used = np.unique(experts)
            self.touch(layer, used[used != NO_EXPERT])

    def device_state(self) -> tuple[np.ndarray, Sequence[np.ndarray] | None]:
        """What a device starts from beside `clock`: a vector and, under rules that have them, two
        more, float64 [L * E].
        """
        return self.values, self.table()

    def resume(self, values: np.ndarray, clock: int, table: np.ndarray) -> None:
        """Take over `device_state` and `clock` as a device left them; tables that the host computes
        are here anyway.
        """
        if not self.rule.is_from_host:
            self.values[:] = values
            self.clock = clock

    def table(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The step about to run as two vectors, float64 [L * E]: the values of each layer's
        experts before that layer has run, and after; under STAMP as they are, and of those that are
        used. None for policies that follow their touches.
        """
        return None
