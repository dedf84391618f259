"""How long decoding would take: a link, a compute time, and prefetches that have a price.

The model of one step: layer after layer, first the missing experts cross the link one by one, then
the layer computes. While it computes the link is idle, and may carry experts of later layers. A
transfer once begun is finished. An expert that is on its way when its layer wants it is *late*: the
layer waits for the rest of it. The figures are of the model, not of a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from runtime.cache.belady import Calls
from runtime.cache.forecast import Forecast
from runtime.cache.policy import Policy

PrefetchPlan = Literal["none", "priced", "greedy"]
NOTHING = -1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Times in milliseconds."""

    expert_ms: float
    """One expert over the link."""
    layer_ms: float
    """One layer with its experts at hand."""


@dataclass(kw_only=True)
class Tally:
    """What happened, over all steps."""

    milliseconds: float = 0.0
    demanded: int = 0
    """Experts loaded when they were needed."""
    timely: int = 0
    """Prefetched experts that had arrived when needed."""
    late: int = 0
    """Prefetched experts that were on their way when needed."""
    prefetched: int = 0

    @property
    def wasted(self) -> int:
        """Prefetched experts that were not used in the step they were meant for."""
        return self.prefetched - self.timely - self.late


class Timeline:
    """One cache under one policy and one plan of prefetching, on one machine."""

    def __init__(
        self,
        policy: Policy,
        shape: tuple[int, int],
        slots: int,
        machine: Machine,
        plan: PrefetchPlan,
    ) -> None:
        self._policy, self._machine, self._plan = policy, machine, plan
        self._num_layers, self._num_experts = shape
        self._free = slots
        self._resident = np.zeros(shape[0] * shape[1], bool)
        self._evictable = self._resident.copy()
        self._known_LE = np.zeros(shape, np.float32)
        self._early: set[int] = set()
        self._now = self._link_free = 0.0
        self._arriving = NOTHING
        self._misses = 0.5
        self.tally = Tally()

    def step(
        self, forecast: Forecast | None, calls: Calls, ahead_LDE: np.ndarray | None = None
    ) -> None:
        """Decode one token.

        `ahead_LDE`: [l, d - 1] are the probabilities of layer l + d's experts that are known once
        layer l's router input exists, which is when its missing experts are asked for. They take
        the place of the forecast and of what was said from further off.
        """
        start = self._now
        self._policy.begin_step(forecast)
        self._known_LE[:] = 0.0 if forecast is None else forecast.this_LE
        for layer, experts in calls:
            if ahead_LDE is not None:
                self._reveal(layer, ahead_LDE[layer])
            self._run(layer, experts)
        self._early.clear()
        self.tally.milliseconds += self._now - start

    def _reveal(self, layer: int, probability_DE: np.ndarray) -> None:
        for coming, probability_E in enumerate(probability_DE, layer + 1):
            if coming < self._num_layers:
                self._known_LE[coming] = probability_E
                self._policy.reveal(coming, self._known_LE[coming])

    def _run(self, layer: int, experts: np.ndarray) -> None:
        keys = layer * self._num_experts + experts
        self._evictable[:] = self._resident
        self._evictable[keys] = False
        self._policy.touch(layer, experts)
        self._settle(keys)
        missing = keys[~self._resident[keys]]
        if len(missing):
            ready = max(self._now, self._link_free) + len(missing) * self._machine.expert_ms
            self._now = self._link_free = ready
            self.tally.demanded += len(missing)
            for key in missing:
                self._admit(int(key))
        self._misses = 0.95 * self._misses + 0.05 * (len(missing) > 0)
        end = self._now + self._machine.layer_ms
        if self._plan != "none":
            self._prefetch(layer, end)
        self._now = end

    def _settle(self, keys: np.ndarray) -> None:
        """Count the prefetches of this layer, and wait for the one that is late."""
        for key in keys.tolist():
            if key in self._early and self._resident[key]:
                late = key == self._arriving and self._link_free > self._now
                self.tally.late += late
                self.tally.timely += not late
                self._now = max(self._now, self._link_free) if late else self._now

    def _admit(self, key: int) -> None:
        if self._free:
            self._free -= 1
        else:
            victim = self._victim()
            self._resident[victim] = self._evictable[victim] = False
        self._resident[key] = True

    def _victim(self) -> int:
        """The resident of lowest value that the running layer does not need."""
        residents = self._evictable.nonzero()[0]
        return int(residents[self._policy.values[residents].argmin()])

    def _prefetch(self, layer: int, end: float) -> None:
        """Fill the link while `layer` computes, with experts of later layers of this step."""
        probability = self._known_LE.reshape(-1).copy()
        probability[: (layer + 1) * self._num_experts] = 0.0
        if self._plan == "greedy":  # only the next layer's, as look-ahead prefetchers do
            probability[(layer + 2) * self._num_experts :] = 0.0
        probability[self._resident] = 0.0
        while (idle := end - max(self._now, self._link_free)) > 0:
            key = int(probability.argmax())
            if probability[key] <= 0.0 or not self._pays(probability[key], idle):
                return
            self._link_free = max(self._now, self._link_free) + self._machine.expert_ms
            self._admit(key)
            self._evictable[key] = True
            self._early.add(key)
            self._arriving = key
            self.tally.prefetched += 1
            probability[key] = 0.0

    def _pays(self, probability: float, idle: float) -> bool:
        """Is the time that the prefetch saves, if used, worth more than what it costs?

        Saved: a transfer, at the probability of use. Paid: the victim's own expected reuse, and the
        part of the transfer that outlasts the idle time, which delays the next layer's loads at the
        rate at which layers have any. Probabilities and values are in units of one use.
        """
        if self._plan == "greedy":
            return probability > 0.5
        lost = 0.0 if self._free else self._policy.values[self._victim()]
        delay = max(self._machine.expert_ms - idle, 0.0) / self._machine.expert_ms
        return bool(probability - lost - delay * self._misses > 0)
