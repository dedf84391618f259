"""The blend: probabilities of use mixed in log-odds, with weights that are learnt online."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from routing.predictor_file.format import FAR

SURE = 1e-4
"""Probabilities are kept this far from 0 and 1: one surprise must not outweigh a session."""

Heads = Sequence[np.ndarray] | np.ndarray
"""Float32 [keys] for each of the four heads."""


class LogOddsBlend:
    """Mixes the probabilities of several advisors, and learns from what was used.

    For each head j (this step, the next, the next H and the next FAR * H steps) and expert e,

        p_j(e) = sigmoid(w_j . x_j(e) + b_j(e))

    where x_j holds each advisor's log-odds and a constant, w_j is common to all experts and
    layers, and b_j is one bias per expert. A head is scored as soon as its steps have run: an
    online logistic regression with the log-loss. The weights take online Newton steps (Hazan,
    Agarwal and Kale 2007) with curvature fading by FADE, so that their loss over T steps exceeds
    that of the best *fixed* weights by O(n log T) without fading, and follows changing ones with
    it; a head of delay d learns d steps late, which multiplies the bound by at most d + 1 (Joulani,
    György and Szepesvári 2013). Among those fixed weights is each advisor alone (a unit
    vector), as it is or recalibrated (a scale and a shift). So neither a wrong forecast nor a
    frequency that says nothing costs more than the steps in which that shows. The biases are each
    expert's log-odds prior: steps of BIAS_RATE by the expert's own fading curvature; they move
    beside the weights, and the bound leaves them out.

    The bound is on the log-loss of the probabilities. It carries over to hits only as far as better
    probabilities order experts better; no bound on the hits themselves is claimed.
    """

    FADE = 0.99
    BIAS_RATE = 0.1
    BIAS_PRIOR = 10.0
    """Curvature that a bias starts with: some tens of uses or clear non-uses move it."""
    WEIGHT_PRIOR = 50.0
    EVERY_STEP, SELDOM = 200, 8
    """Curvature hardly changes: after so many steps, it is followed in every eighth."""
    LARGEST = 4.0
    """Bound of a weight."""

    def __init__(self, start: Sequence[float], num_keys: int, *, horizon: int) -> None:
        """start: the weight of each advisor before anything is known."""
        num_inputs = len(start) + 1
        self._delays = 0, 1, horizon, FAR * horizon
        self._spans = 1, 1, horizon, FAR * horizon
        self._weights = np.tile(np.array([*start, 0.0], np.float32), (4, 1))
        self._start = self._weights.copy()
        self._biases = np.zeros((4, num_keys), np.float32)
        self._curvature = np.zeros((4, num_inputs, num_inputs))
        self._prior = self.WEIGHT_PRIOR * np.eye(num_inputs)
        self._bias_curvature = np.full((4, num_keys), self.BIAS_PRIOR, np.float32)
        self._inputs = [np.ones((d + 1, num_inputs, num_keys), np.float32) for d in self._delays]
        self._said = [np.zeros((d + 1, num_keys), np.float32) for d in self._delays]
        self._last_use = np.full(num_keys, -(10**6), np.int32)
        self._step = 0

    def mix(self, advice: Sequence[Heads], common: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Blended probabilities, float32 [4, keys], of the step about to run.

        advice: the four heads of each advisor's probabilities, float32 [keys] each. common: those
        of advisors who say the same to all heads. May be called again in the same step, with better
        advice.
        """
        mixed = np.empty_like(self._biases)
        log_odds = [to_log_odds(probabilities) for probabilities in common]
        for head in range(4):
            inputs = self._inputs[head][self._step % len(self._said[head])]
            for row, heads in zip(inputs, advice, strict=False):
                to_log_odds(heads[head], out=row)
            for row, odds in zip(inputs[len(advice) :], log_odds, strict=False):
                row[:] = odds
            np.matmul(self._weights[head], inputs, out=mixed[head])
        mixed += self._biases
        _sigmoid(mixed)
        for head, said in enumerate(self._said):
            said[self._step % len(said)] = mixed[head]
        return mixed

    def learn(self, used: np.ndarray) -> None:
        """The step has run, and used these keys (bool [keys])."""
        self._last_use[used] = self._step
        num_heads = sum(delay <= self._step for delay in self._delays)
        pulls = np.empty((num_heads, self._weights.shape[1], 1), np.float32)
        for head in range(num_heads):
            span = self._spans[head]
            truth = used if span == 1 else self._last_use > self._step - span
            pulls[head, :, 0] = self._score(head, self._step - self._delays[head], truth)
        weights = self._weights[:num_heads]
        curvature = self._curvature[:num_heads] + self._prior
        weights -= np.linalg.solve(curvature, pulls)[..., 0].astype(np.float32)
        np.clip(weights, -self.LARGEST, self.LARGEST, out=weights)
        self._step += 1

    def _score(self, head: int, scored: int, truth: np.ndarray) -> np.ndarray:
        """Score what was said in the step `scored`: move the biases, and return the slope of the
        loss in the weights.
        """
        entry = scored % len(self._said[head])
        inputs, said = self._inputs[head][entry], self._said[head][entry]
        if scored < self.EVERY_STEP:
            self._follow_curvature(head, inputs, said, 1)
        elif (scored + head) % self.SELDOM == 0:  # the heads take turns
            self._follow_curvature(head, inputs, said, self.SELDOM)
        error = said - truth
        slope: np.ndarray = inputs @ error + (self._weights[head] - self._start[head])
        error *= self.BIAS_RATE
        error /= self._bias_curvature[head]
        self._biases[head] -= error
        return slope

    def _follow_curvature(
        self, head: int, inputs: np.ndarray, said: np.ndarray, steps: int
    ) -> None:
        """Take these inputs for those of so many steps."""
        fade, slope = self.FADE**steps, said * (1 - said)
        slope *= steps
        curvature, own = self._curvature[head], self._bias_curvature[head]
        curvature *= fade
        curvature += (inputs * slope) @ inputs.T
        own *= fade
        own += slope
        own += self.BIAS_PRIOR * (1 - fade)


def to_log_odds(probabilities: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Log-odds within SURE of certainty; what is not a number counts as unlikely."""
    least, most = _bounds(probabilities.shape)
    bounded = np.fmax(probabilities, least, out=out)
    np.fmin(bounded, most, out=bounded)
    bounded /= 1 - bounded
    return np.log(bounded, out=bounded)


@lru_cache(maxsize=8)
def _bounds(shape: tuple[int, ...]) -> np.ndarray:
    """SURE and 1 - SURE as arrays: numpy compares with them three times as fast as with scalars."""
    return np.stack([np.full(shape, SURE, np.float32), np.full(shape, 1 - SURE, np.float32)])


def _sigmoid(log_odds: np.ndarray) -> None:
    """In place; extremes are bounded, so that no later step divides by zero."""
    np.clip(log_odds, -12.0, 12.0, out=log_odds)
    np.negative(log_odds, out=log_odds)
    np.exp(log_odds, out=log_odds)
    log_odds += 1.0
    np.reciprocal(log_odds, out=log_odds)
