"""Signatures: short vectors that are close where the text, as the predictor and the routers see it,
is alike.
"""

from __future__ import annotations

import numpy as np

SIZE = 64
"""Numbers of a signature."""
TRAIL_WEIGHT = 0.7
"""Weight of the routes just taken beside what is expected of the next token."""
TRAIL_FADE = 0.7
"""Fading of a route in the trail, a token."""
LARGEST_LOGIT = 9.2
"""Logits are kept this close to 0: one sure expert must not decide what is alike."""
MEAN_TOKENS = 8192
"""Tokens over which means are taken."""


class Signatures:
    """Makes the signature of a token about to run, a vector of length 1.

    It joins the predictor's logits of the token after it with the routes of the tokens before it
    (the trail: the newest most), both less their means over the session, and each of the same
    typical length. Of L * E numbers each, a count sketch (Charikar, Chen and Farach-Colton 2002)
    keeps SIZE: key k is added to the number k % SIZE with a random sign, by which dot products stay
    the same on average.
    """

    def __init__(self, num_keys: int) -> None:
        random = np.random.default_rng(0)
        padded = num_keys + -num_keys % SIZE
        signs = random.choice(np.array([-1, 1], np.float32), (2, padded))
        self._logits, self._num_keys = np.zeros(padded, np.float32), num_keys
        self._logit_signs = signs[0].reshape(-1, SIZE)
        self._route_signs = signs[1]
        self._expected, self._trails = _Centred(), _Centred()

    def trail(self, before: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The trail [SIZE] after these keys were used, from the one before."""
        added = np.bincount(keys % SIZE, self._route_signs[keys], SIZE)
        trail: np.ndarray = TRAIL_FADE * before + added.astype(np.float32)
        return trail

    def sign(self, trail: np.ndarray, next_logits_LE: np.ndarray) -> np.ndarray:
        """The signature [SIZE] of a token: its trail, and the logits of use by the next one."""
        bounded = self._logits[: self._num_keys]
        np.fmax(next_logits_LE.reshape(-1), np.float32(-LARGEST_LOGIT), out=bounded)  # drops NaN
        np.fmin(bounded, np.float32(LARGEST_LOGIT), out=bounded)
        expected = np.einsum("rs,rs->s", self._logits.reshape(-1, SIZE), self._logit_signs)
        joined = self._expected.scaled(expected) + TRAIL_WEIGHT * self._trails.scaled(trail)
        signature: np.ndarray = joined / (np.linalg.norm(joined) + np.float32(1e-6))
        return signature


class _Centred:
    """The running mean of vectors, and the mean square of their distance from it."""

    def __init__(self) -> None:
        self._count, self._square = 0, 0.0
        self._mean = np.zeros(SIZE, np.float32)

    def scaled(self, vector: np.ndarray) -> np.ndarray:
        """The vector less the mean, in units of a typical distance."""
        self._count = min(self._count + 1, MEAN_TOKENS)
        self._mean += (vector - self._mean) / self._count
        centred = vector - self._mean
        self._square += (float(centred @ centred) - self._square) / self._count
        return centred / np.float32(self._square**0.5 + 1e-6)
