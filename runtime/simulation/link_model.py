"""A model of decoding time: one link, one compute time a layer, and priced prefetches.

In each layer of a step the missing experts cross the link one by one, then the layer computes.
Meanwhile the link is idle and may carry experts of later layers. A transfer that has begun is
finished. An expert that is still in transfer when its layer needs it is *late*: the layer waits for
the rest of it. The times are those of this model, not of a real machine.
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
    """The modelled machine; times in milliseconds."""

    expert_ms: float
    """Time of one expert on the link."""
    layer_ms: float
    """Time to compute one layer whose experts are resident."""


@dataclass(kw_only=True)
class TimelineCounts:
    """Time and counts of experts, over all steps."""

    milliseconds: float = 0.0
    demanded: int = 0
    """Experts loaded when they were needed: misses."""
    timely: int = 0
    """Prefetched experts that had arrived when needed."""
    late: int = 0
    """Prefetched experts that were still in transfer when needed."""
    prefetched: int = 0
    """All prefetched experts."""

    @property
    def wasted(self) -> int:
        """Prefetched experts that were not used in the step for which they were prefetched."""
        return self.prefetched - self.timely - self.late


class Timeline:
    """One cache under one policy and one prefetch plan, on one modelled machine.

    plan: "none"; "priced", which prefetches where the expected saving exceeds the cost; "greedy",
    which prefetches for the next layer whatever is more likely used than not.
    """

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
        self._prefetched: set[int] = set()
        self._now = self._link_free = 0.0
        self._arriving = NOTHING
        self._misses = 0.5
        self.counts = TimelineCounts()

    def step(
        self, forecast: Forecast | None, calls: Calls, ahead_LDE: np.ndarray | None = None
    ) -> None:
        """Decode one token.

        ahead_LDE: [l, d - 1] are the probabilities of the experts of layer l + d, known once the
        router input of layer l exists, which is when its own misses are loaded. They replace the
        forecast, and what was predicted from a greater distance.
        """
        start = self._now
        self._policy.begin_step(forecast)
        self._known_LE[:] = 0.0 if forecast is None else forecast.this_LE
        for layer, experts in calls:
            if ahead_LDE is not None:
                self._reveal(layer, ahead_LDE[layer])
            self._run(layer, experts)
        self._prefetched.clear()
        self.counts.milliseconds += self._now - start

    def _reveal(self, layer: int, probability_DE: np.ndarray) -> None:
        """Replace what is known of the layers after `layer`."""
        for coming, probability_E in enumerate(probability_DE, layer + 1):
            if coming < self._num_layers:
                self._known_LE[coming] = probability_E
                self._policy.reveal(coming, self._known_LE[coming])

    def _run(self, layer: int, experts: np.ndarray) -> None:
        """Load the misses of one layer, compute it, and prefetch meanwhile."""
        keys = layer * self._num_experts + experts
        self._evictable[:] = self._resident
        self._evictable[keys] = False
        self._policy.touch(layer, experts)
        self._count_prefetched(keys)
        missing = keys[~self._resident[keys]]
        if len(missing):
            ready = max(self._now, self._link_free) + len(missing) * self._machine.expert_ms
            self._now = self._link_free = ready
            self.counts.demanded += len(missing)
            for key in missing:
                self._admit(int(key))
        self._misses = 0.95 * self._misses + 0.05 * (len(missing) > 0)
        end = self._now + self._machine.layer_ms
        if self._plan != "none":
            self._prefetch(layer, end)
        self._now = end

    def _count_prefetched(self, keys: np.ndarray) -> None:
        """Count the prefetched experts of this layer, and wait for the one that is late."""
        for key in keys.tolist():
            if key in self._prefetched and self._resident[key]:
                late = key == self._arriving and self._link_free > self._now
                self.counts.late += late
                self.counts.timely += not late
                self._now = max(self._now, self._link_free) if late else self._now

    def _admit(self, key: int) -> None:
        """Make an expert resident, evicting another if no slot is free."""
        if self._free:
            self._free -= 1
        else:
            victim = self._victim()
            self._resident[victim] = self._evictable[victim] = False
        self._resident[key] = True

    def _victim(self) -> int:
        """The resident expert of lowest value that the running layer does not need."""
        residents = self._evictable.nonzero()[0]
        return int(residents[self._policy.values[residents].argmin()])

    def _prefetch(self, layer: int, end: float) -> None:
        """Prefetch experts of later layers of this step while `layer` computes."""
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
            self._prefetched.add(key)
            self._arriving = key
            self.counts.prefetched += 1
            probability[key] = 0.0

    def _pays(self, probability: float, idle: float) -> bool:
        """True if the time that the prefetch is expected to save exceeds its cost.

        It saves a transfer, at the probability of use. It costs the victim's own expected reuse,
        and the part of the transfer that outlasts the idle time: that delays the misses of the next
        layer, at the rate at which layers have any. The unit of all is the transfer of one expert.
        """
        if self._plan == "greedy":
            return probability > 0.5
        lost = 0.0 if self._free else self._policy.values[self._victim()]
        delay = max(self._machine.expert_ms - idle, 0.0) / self._machine.expert_ms
        return bool(probability - lost - delay * self._misses > 0)
