"""Cache policies: each keeps one value for every expert; the cache evicts the lowest.

A policy is data, not code in the hot path: `values` is one float64 vector over the keys
(layer * E + expert), updated where the routes become known. The policies differ in nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from routing.topology import NO_EXPERT

Calls = Sequence[tuple[int, np.ndarray]]
"""Expert calls in order: (layer, distinct experts int64 [N])."""


FAR = 4
"""A forecast's far horizon over its near one, H."""


class Forecast(NamedTuple):
    """Probabilities, float32 [L, E], that an expert is used by any sequence of the batch."""

    this_LE: np.ndarray
    """in the step about to run"""
    next_LE: np.ndarray
    """in the step after it"""
    horizon_LE: np.ndarray
    """at least once within the next H steps"""
    far_LE: np.ndarray
    """at least once within the next FAR * H steps"""


class Policy(ABC):
    """Produces `values`, float64 [L * E]: how much each expert is worth keeping."""

    name: ClassVar[str]
    needs_forecast: ClassVar[bool] = False

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        self.values = np.zeros(num_layers * num_experts)

    def begin_step(self, forecast: Forecast | None) -> None:  # noqa: B027 - most need nothing
        """A forward pass is about to start; `forecast` is None where there is no prediction."""

    def revise(self, forecast: Forecast) -> None:  # noqa: B027 - most need nothing
        """A better forecast of the running step."""

    def reveal(self, layer: int, probability_E: np.ndarray) -> None:  # noqa: B027 - most do not ask
        """A layer still to run in this step will use its experts with these probabilities."""

    @abstractmethod
    def touch(self, layer: int, experts: np.ndarray) -> None:
        """`layer` is about to use these distinct experts (int64 [N])."""

    def touch_routes(self, routes: Iterable[np.ndarray]) -> None:
        """A whole step: for each layer the experts that it used (int, any shape), NO_EXPERT for
        none.
        """
        for layer, experts in enumerate(routes):
            used = np.unique(experts)
            self.touch(layer, used[used != NO_EXPERT])

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


class LeastStale(Policy):
    """What was not used for the most steps goes first; of equals, what has its turn furthest off.

    After SpecMD's eviction by staleness (arXiv 2602.03921), as we read it.
    """

    name = "least-stale"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._last_LE = np.zeros((num_layers, num_experts))
        self._step = 0

    def begin_step(self, forecast: Forecast | None) -> None:
        self._step += 1
        num_layers = len(self._last_LE)
        turn_L1 = np.arange(num_layers)[:, None]
        self.values = (2 * num_layers * (self._last_LE + 1) - turn_L1).reshape(-1)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        self._last_LE[layer, experts] = self._step
        num_layers = len(self._last_LE)
        row = slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        self.values[row] = 2 * num_layers * self._last_LE[layer] + num_layers - layer


class PredictedReuse(Policy):
    """Probabilistic Belady: an expert's value is its expected discounted next use.

    Belady's rule keeps what is used soonest; with the next use T uncertain, keep what has the
    largest E[G ** T]: a use a step away is worth G = DISCOUNT of one now, two steps away G ** 2.
    Time runs in layers: layer l of this step is l layers after the step's start, L layers are a
    step. With p the probability of use in this step (the predictor's first head), the value is

        v(l, e) = g^l * (p + (1 - p) * G * r)         while layer l of this step is still to run
        v(l, e) = g^l * G * r                         once it ran;  g = G ** (1 / L)

    where r = E[G ** (T - 1)] over the steps T = 1, 2, ... after this one. The other heads give the
    distribution of T at three points, F(1), F(H) and F(FAR * H). By the law of total expectation
    over the intervals between them, T taken as uniform within each,

        r = F(1) + w1 * (F(H) - F(1)) + w2 * (F(FAR * H) - F(H)) + (1 - F(FAR * H)) * t

    with w1, w2 the means of G ** (d - 1) over the steps d of an interval. Beyond the far horizon
    speaks what the cache has seen: q, an exponential mean of the uses over MEMORY, as the chance of
    use in each later step, so that t = G ** (FAR * H) * q / (1 - (1 - q) * G).

    Without a forecast q stands for p, and r = q / (1 - (1 - q) * G). What becomes known while the
    step runs (`reveal`: a look-ahead from a layer's router input) replaces p; it says nothing of
    later steps, so that r stays.

    A common factor g^now drops out of every comparison, so that the values only change where a
    layer runs: two vectors over all keys, before and after, describe a whole step. Admission is a
    comparison in the same vector: a missed expert is worth a slot when its value *after* its layer
    ran exceeds the lowest resident's; else it can be streamed through
    (`runtime.simulation.replay`).
    """

    name = "predicted"
    needs_forecast = True
    DISCOUNT = 0.85
    MEMORY = 0.98

    def __init__(self, num_layers: int, num_experts: int, *, horizon: int) -> None:
        super().__init__(num_layers, num_experts)
        self._used_LE = np.zeros((num_layers, num_experts), np.float32)
        self._after_LE = np.zeros((num_layers, num_experts))
        discount, far = self.DISCOUNT, FAR * horizon
        powers = discount ** np.arange(far, dtype=np.float32)
        near = powers[1:horizon].mean() if horizon > 1 else 1.0
        self._weights = np.float32(near), np.float32(powers[horizon:].mean())
        self._beyond = np.float32(discount**far)
        self._layer_discount_L1 = np.float32(discount) ** (
            np.arange(num_layers, dtype=np.float32)[:, None] / num_layers
        )

    def begin_step(self, forecast: Forecast | None) -> None:
        self._used_LE *= self.MEMORY
        self.revise(forecast)

    def revise(self, forecast: Forecast | None) -> None:
        seen_LE = np.minimum(self._used_LE * (1 - self.MEMORY), 1.0)
        later_LE = seen_LE / (1 - (1 - seen_LE) * self.DISCOUNT)
        now_LE = seen_LE if forecast is None else forecast.this_LE
        if forecast is not None:
            later_LE = self._later(forecast, later_LE)
        after_LE = self._layer_discount_L1 * later_LE
        after_LE *= self.DISCOUNT
        before_LE = self._layer_discount_L1 * now_LE + (1 - now_LE) * after_LE
        self._after_LE = after_LE.astype(np.float64)
        self.values = before_LE.astype(np.float64).reshape(-1)

    def _later(self, forecast: Forecast, beyond_LE: np.ndarray) -> np.ndarray:
        """The formula's r; the heads are made to grow with the horizon, as they ought to."""
        near, far = self._weights
        next_LE = forecast.next_LE
        horizon_LE = np.maximum(forecast.horizon_LE, next_LE)
        far_LE = np.maximum(forecast.far_LE, horizon_LE)
        later_LE: np.ndarray = (
            (1 - near) * next_LE
            + (near - far) * horizon_LE
            + far * far_LE
            + (1 - far_LE) * (self._beyond * beyond_LE)
        )
        return later_LE

    def reveal(self, layer: int, probability_E: np.ndarray) -> None:
        now_E = self._layer_discount_L1[layer] * probability_E
        row = slice(layer * self.num_experts, (layer + 1) * self.num_experts)
        self.values[row] = now_E + (1 - probability_E) * self._after_LE[layer]

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
