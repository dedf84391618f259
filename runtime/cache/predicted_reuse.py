"""Predicted reuse: probabilistic Belady over a forecast and over what the cache has seen."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from routing.predictor_file.format import FAR
from runtime.cache.blend import Heads, LogOddsBlend
from runtime.cache.forecast import Forecast
from runtime.cache.policy import Policy

UNSEEN = 0.12
"""Frequency of use that an expert is given before the first step, and for how many steps."""
UNSEEN_STEPS = 0.5


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
    stands what the cache has seen: q, an exponential mean of the uses over MEMORY, is the chance of
    use in each later step, so that t = G ** (FAR * H) * q / (1 - (1 - q) * G).

    No head is taken at its word. p and F are a `LogOddsBlend` of the forecast, of what followed the
    same tokens and tokens alike earlier in the session (`Forecast.remembered`), and of how often an
    expert was used lately, by a fast and a slow mean (RECENT, MEMORY). Its weights and its bias for
    each expert follow the routes as they become known. So the log-loss of p and of each F is
    bounded against the forecast alone, and against the frequencies that LFU orders by (see there).

    Without a forecast the slow mean stands for it: 1 - (1 - q) ** h for a head of h steps. What
    becomes known while the step runs (`reveal`: a look-ahead from a layer's router input) replaces
    p; it says nothing of later steps, so that r stays.

    A common factor g^now drops out of every comparison, so that the values only change where a
    layer runs: two vectors over all keys, before and after, describe a whole step. Admission is a
    comparison in the same vector: a missed expert is worth a slot when its value *after* its layer
    ran exceeds the lowest resident's; else it can be streamed through
    (`runtime.simulation.replay`).
    """

    name = "predicted"
    needs_forecast = True
    DISCOUNT = 0.8
    MEMORY = 0.98
    RECENT = 0.9
    TRUST = 0.6, 0.2, 0.2, 0.0, 0.0
    """The weights to begin with: of the forecast, of what followed the same tokens, and tokens
    alike, of the fast and the slow mean."""

    def __init__(self, num_layers: int, num_experts: int, *, horizon: int) -> None:
        super().__init__(num_layers, num_experts)
        self._shape, self._horizon = (num_layers, num_experts), horizon
        keys = num_layers * num_experts
        self._blend = LogOddsBlend(self.TRUST, keys, horizon=horizon)
        self._used, self._has_run, self._has_mixed = np.zeros(keys, bool), False, False
        self._fades = np.array([[self.RECENT], [self.MEMORY]], np.float32)
        self._uses, self._steps = np.zeros((2, keys), np.float32), np.zeros((2, 1), np.float32)
        self._first_key_L1 = num_experts * np.arange(num_layers)[:, None]
        self._after_LE = np.zeros(self._shape)
        discount, far = self.DISCOUNT, FAR * horizon
        powers = discount ** np.arange(far, dtype=np.float32)
        near = powers[1:horizon].mean() if horizon > 1 else 1.0
        self._weights = np.float32(near), np.float32(powers[horizon:].mean())
        self._beyond = np.float32(discount**far)
        self._layer_discount_L1 = np.float32(discount) ** (
            np.arange(num_layers, dtype=np.float32)[:, None] / num_layers
        )

    def begin_step(self, forecast: Forecast | None) -> None:
        if self._has_run:
            self._learn()
        self.revise(forecast)

    def _learn(self) -> None:
        """The step that was touched is over."""
        self._blend.learn(self._used)
        self._uses *= self._fades
        self._uses += (1 - self._fades) * self._used
        self._steps *= self._fades
        self._steps += 1 - self._fades
        self._used.fill(False)
        self._has_run = self._has_mixed = False

    def revise(self, forecast: Forecast | None) -> None:
        seen = (self._uses + UNSEEN * UNSEEN_STEPS) / (self._steps + UNSEEN_STEPS)
        self.expected = self._blended(forecast, seen)
        slow_LE = seen[1].reshape(self._shape)
        beyond_LE = slow_LE / (1 - (1 - slow_LE) * self.DISCOUNT)
        now_LE, later_LE = self.expected.this_LE, self._later(self.expected, beyond_LE)
        after_LE = self._layer_discount_L1 * later_LE
        after_LE *= self.DISCOUNT
        before_LE = self._layer_discount_L1 * now_LE + (1 - now_LE) * after_LE
        self._after_LE = after_LE.astype(np.float64)
        self.values = before_LE.astype(np.float64).reshape(-1)

    def _blended(self, forecast: Forecast | None, seen: np.ndarray) -> Forecast:
        """The heads, blended; `seen` are the fast and the slow mean."""
        recent, slow = seen
        spans = np.array([[1], [1], [self._horizon], [FAR * self._horizon]], np.float32)
        said: Heads = 1 - (1 - slow) ** spans
        same = alike = said
        if forecast is not None:
            said = [plane.reshape(-1) for plane in forecast[:4]]
            if forecast.remembered is not None:
                same, alike = forecast.remembered.reshape(2, 4, -1)
        mixed = self._blend.mix([said, same, alike], common=[recent, slow])
        self._has_mixed = True
        return Forecast(*mixed.reshape(4, *self._shape))

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
        first = layer * self.num_experts
        self._used[first + experts] = True
        self._has_run = True
        self.values[first : first + self.num_experts] = self._after_LE[layer]

    def touch_routes(self, routes: Iterable[np.ndarray]) -> None:
        if not isinstance(routes, np.ndarray) or len(routes) != self._shape[0]:
            super().touch_routes(routes)
            return
        keys = routes.reshape(len(routes), -1) + self._first_key_L1
        self._used[keys[keys >= self._first_key_L1]] = True
        self._has_run = True
        self.values[:] = self._after_LE.reshape(-1)
        if self._has_mixed:  # the step that was forecast is over: learn before the next is known
            self._learn()

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        return self.values.copy(), self._after_LE.reshape(-1).astype(np.float64)
