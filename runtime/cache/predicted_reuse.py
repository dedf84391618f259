"""Predicted reuse: probabilistic Belady over a forecast and over what the cache has seen."""

from __future__ import annotations

import numpy as np

from routing.predictor_file.format import FAR
from runtime.cache.forecast import Forecast
from runtime.cache.policy import Policy


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
