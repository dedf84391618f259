"""Cache policies: each keeps one value for every expert; the cache evicts the lowest.

A policy is data, not code in the hot path: `values` is one float64 vector over the keys
(layer * E + expert), updated where the routes become known. The policies differ in nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

Calls = Sequence[tuple[int, np.ndarray]]
"""Expert calls in order: (layer, distinct experts int64 [N])."""


class Forecast(NamedTuple):
    """Probabilities, float32 [L, E], that an expert is used by any sequence of the batch."""

    this_LE: np.ndarray
    """in the step about to run"""
    next_LE: np.ndarray
    """in the step after it"""
    horizon_LE: np.ndarray
    """at least once within the next H steps"""


class Policy(ABC):
    """Produces `values`, float64 [L * E]: how much each expert is worth keeping."""

    name: ClassVar[str]
    needs_forecast: ClassVar[bool] = False

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        self.values = np.zeros(num_layers * num_experts)

    def begin_step(self, forecast: Forecast | None) -> None:  # noqa: B027 - most need nothing
        """A forward pass is about to start; `forecast` is None where there is no prediction."""

    @abstractmethod
    def touch(self, layer: int, experts: np.ndarray) -> None:
        """`layer` is about to use these distinct experts (int64 [N])."""

    def table(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The step about to run as two vectors, float64 [L * E]: the values of each layer's
        experts before that layer has run, and after. None for policies that follow their touches.
        """
        return None


class LRU(Policy):
    """Least recently used; within one call, experts of lower id are older."""

    name = "lru"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self.clock = 0

    def touch(self, layer: int, experts: np.ndarray) -> None:
        count = len(experts)
        self.values[layer * self.num_experts + experts] = np.arange(self.clock, self.clock + count)
        self.clock += count


class LFU(Policy):
    """Least frequently used, with uses fading by `DECAY` a step."""

    name = "lfu"
    DECAY = 0.98

    def begin_step(self, forecast: Forecast | None) -> None:
        self.values *= self.DECAY

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self.values[layer * self.num_experts + experts] += 1.0


class PredictedReuse(Policy):
    """Probabilistic Belady: an expert's value is its expected discounted next use.

    Time runs in layers: layer l of this step is l layers after the step's start, and a use d layers
    away is worth DISCOUNT ** (d / L). With p1 and p2 the probabilities of use in this step and in
    the next (the predictor's heads), and q the probability of use in any one later step, the first
    use from now on is worth

        v(l, e) = g^l * (p1 + (1 - p1) * g^L * r)     while layer l of this step is still to run
        v(l, e) = g^l * g^L * r                       once it ran
        r = p2 + (1 - p2) * G * q / (1 - (1 - q) * G)

    with g = DISCOUNT ** (1 / L) and G = g^L = DISCOUNT: the last fraction is the sum over
    first uses at steps 2, 3, ... of a geometric law, each discounted by G a step. A common factor
    g^now drops out of every comparison, so the vector only changes where a layer runs. q blends the
    predictor's horizon head (q = 1 - (1 - pH) ^ (1 / H)) with the uses that the cache has seen, an
    exponential mean over steps: the horizon knows the text, the memory knows the session.
    """

    name = "predicted"
    needs_forecast = True
    DISCOUNT = 0.8
    MEMORY = 0.98
    MEMORY_WEIGHT = 0.1

    def __init__(self, num_layers: int, num_experts: int, *, horizon: int) -> None:
        super().__init__(num_layers, num_experts)
        self._horizon = horizon
        self._used_LE = np.zeros((num_layers, num_experts))
        self._after_LE = np.zeros((num_layers, num_experts))
        self._layer_discount_L1 = self.DISCOUNT ** (np.arange(num_layers)[:, None] / num_layers)

    def begin_step(self, forecast: Forecast | None) -> None:
        self._used_LE *= self.MEMORY
        seen_LE = np.minimum(self._used_LE * (1 - self.MEMORY), 1.0)
        if forecast is None:
            p1_LE, r_LE = seen_LE, self._later(seen_LE, seen_LE)
        else:
            horizon_LE = 1.0 - (1.0 - forecast.horizon_LE) ** (1.0 / self._horizon)
            later_LE = (1 - self.MEMORY_WEIGHT) * horizon_LE + self.MEMORY_WEIGHT * seen_LE
            p1_LE, r_LE = forecast.this_LE, self._later(forecast.next_LE, later_LE)
        self._after_LE = self._layer_discount_L1 * self.DISCOUNT * r_LE
        now_LE = self._layer_discount_L1 * p1_LE + (1 - p1_LE) * self._after_LE
        self.values = now_LE.reshape(-1).astype(np.float64)

    def _later(self, p2_LE: np.ndarray, q_LE: np.ndarray) -> np.ndarray:
        discount = self.DISCOUNT
        return p2_LE + (1 - p2_LE) * discount * q_LE / (1 - (1 - q_LE) * discount)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self._used_LE[layer, experts] += 1.0
        row = slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        self.values[row] = self._after_LE[layer]

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        return self.values.copy(), self._after_LE.reshape(-1).astype(np.float64)


class Belady(Policy):
    """The optimum without bypass (Belady 1966): evict what is used furthest in the future.

    Needs the calls to come: a replay of a recorded trace. Raises ValueError at a call that the
    recording does not hold.
    """

    name = "belady"

    def __init__(
        self, num_layers: int, num_experts: int, *, calls: Iterable[tuple[int, np.ndarray]]
    ) -> None:
        super().__init__(num_layers, num_experts)
        self._calls = list(calls)
        self._next_uses = link_next_uses(self._calls, num_layers, num_experts)
        self._position = 0
        self.values.fill(-np.inf)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        if self._position >= len(self._calls):
            raise ValueError(f"the recorded trace ends after {self._position} expert calls")
        recorded_layer, recorded = self._calls[self._position]
        if layer != recorded_layer or not np.array_equal(experts, recorded):
            raise ValueError(
                f"expert call {self._position} differs from the recorded trace: layer {layer} uses "
                f"{experts.tolist()}, recorded is layer {recorded_layer} with {recorded.tolist()}"
            )
        self.values[layer * self.num_experts + experts] = self._next_uses[self._position]
        self._position += 1

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        after, num_layers = self.values.copy(), len(self.values) // self.num_experts
        upcoming = slice(self._position, self._position + num_layers)
        for (layer, experts), uses in zip(
            self._calls[upcoming], self._next_uses[upcoming], strict=True
        ):
            after[layer * self.num_experts + experts] = uses
        return self.values.copy(), after


def link_next_uses(calls: Calls, num_layers: int, num_experts: int) -> list[np.ndarray]:
    """For each call, minus the position of each of its experts' next use (-inf for never)."""
    upcoming = np.full((num_layers, num_experts), -np.inf)
    next_uses: list[np.ndarray] = []
    for position in range(len(calls) - 1, -1, -1):
        layer, experts = calls[position]
        next_uses.append(upcoming[layer, experts])
        upcoming[layer, experts] = -float(position)
    return next_uses[::-1]


POLICIES: dict[str, type[Policy]] = {p.name: p for p in (LRU, LFU, PredictedReuse, Belady)}
