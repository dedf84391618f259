"""Look-aheads of a trace as probabilities: calibrated on other text, alone or with a predictor.

Symbols: T tokens, L layers, D distances, M experts named, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from routing.lookahead import LookAhead

NO_SCORE = -30.0
"""A score below that of every named expert."""


class Calibration:
    """The rates at which the experts named by a source are used, by layer, distance, rank and lead.

    The lead of an expert is its score minus the midpoint between the K-th score and the next. Leads
    are cut into `BINS` quantiles: sources have scales of their own, so only the order counts.
    """

    BINS = 8

    def __init__(self, ahead: LookAhead, used_TLE: np.ndarray, top_k: int) -> None:
        self._top_k, self._num_experts = top_k, used_TLE.shape[-1]
        size = ahead.experts_TLDM.shape[1:]
        self._edges_LDMB = np.zeros((*size, self.BINS - 1), np.float32)
        self._rates_LDMB = np.zeros((*size, self.BINS), np.float32)
        self._others_LD = np.zeros(size[:2], np.float32)
        lead_TLDM, named_TLDM = self._leads(ahead), ahead.scores_TLDM > -np.inf
        shares = np.arange(1, self.BINS) / self.BINS
        for source, distance in pairs(*size[:2]):
            used_TE, place = used_TLE[:, source + distance], (source, distance - 1)
            named_TM = named_TLDM[:, *place]
            hits_TM = np.take_along_axis(used_TE, _ids(ahead, *place), axis=1) & named_TM
            rest = len(used_TE) * self._num_experts - named_TM.sum()
            self._others_LD[place] = (used_TE.sum() - hits_TM.sum() + 0.5) / (rest + 1)
            for rank, (lead_T, hits_T) in enumerate(
                zip(lead_TLDM[:, *place].T, hits_TM.T, strict=True)
            ):
                edges = np.quantile(lead_T, shares)
                bins_T = np.searchsorted(edges, lead_T)
                hits = np.bincount(bins_T, hits_T, self.BINS)
                rates = (hits + 0.5) / (np.bincount(bins_T, minlength=self.BINS) + 1)
                self._edges_LDMB[*place, rank], self._rates_LDMB[*place, rank] = edges, rates

    def _leads(self, ahead: LookAhead) -> np.ndarray:
        """Float32 [T, L, D, M]."""
        scores_TLDM = np.maximum(ahead.scores_TLDM.astype(np.float32), NO_SCORE)
        last, after = self._top_k - 1, min(self._top_k, scores_TLDM.shape[-1] - 1)
        midpoint_TLD = (scores_TLDM[..., last] + scores_TLDM[..., after]) / 2
        leads: np.ndarray = scores_TLDM - midpoint_TLD[..., None]
        return leads

    def probabilities(self, ahead: LookAhead) -> np.ndarray:
        """Probabilities of use, float16 [T, L, D, E]: [t, l, d - 1] is for layer l + d.

        They are 0 beyond the last layer.
        """
        num_tokens, *size = ahead.experts_TLDM.shape
        lead_TLDM = self._leads(ahead)
        all_TLDE = np.zeros((num_tokens, *size[:2], self._num_experts), np.float16)
        for source, distance in pairs(*size[:2]):
            place = source, distance - 1
            rates_TM = np.stack([
                self._rates_LDMB[*place, rank][
                    np.searchsorted(self._edges_LDMB[*place, rank], lead_T)
                ]
                for rank, lead_T in enumerate(lead_TLDM[:, *place].T)
            ], axis=1)  # fmt: skip
            nobody = self._num_experts
            ids_TM = np.where(ahead.scores_TLDM[:, *place] > -np.inf, _ids(ahead, *place), nobody)
            row_TE = np.full((num_tokens, nobody + 1), self._others_LD[place])
            np.put_along_axis(row_TE, ids_TM, rates_TM, axis=1)
            all_TLDE[:, *place] = row_TE[:, :nobody]
        return all_TLDE


def _ids(ahead: LookAhead, source: int, place: int) -> np.ndarray:
    """The named experts, int64 [T, M]."""
    ids: np.ndarray = ahead.experts_TLDM[:, source, place].astype(np.int64)
    return ids


def pairs(num_layers: int, depth: int) -> Iterator[tuple[int, int]]:
    """Every (layer, distance) whose target layer exists, for distances up to `depth`."""
    for source in range(num_layers):
        for distance in range(1, min(depth, num_layers - 1 - source) + 1):
            yield source, distance


class Joint:
    """A logistic regression for each distance on the log-odds of a look-ahead and a predictor.

    The predictor's forecast is known before the step. The look-ahead corrects it as layers run.
    """

    ITERATIONS = 8

    def __init__(self, ahead_TLDE: np.ndarray, this_TLE: np.ndarray, used_TLE: np.ndarray) -> None:
        self._weights = [
            self._fit(features, used_TLE[:, distance:].reshape(-1))
            for distance, features in self._features(ahead_TLDE, this_TLE)
        ]

    @staticmethod
    def _features(ahead_TLDE: np.ndarray, this_TLE: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each distance with its features [N, 3]: both log-odds and 1."""
        for distance in range(1, min(ahead_TLDE.shape[2], this_TLE.shape[1] - 1) + 1):
            odds = [
                log_odds(p.reshape(-1))
                for p in (ahead_TLDE[:, :-distance, distance - 1], this_TLE[:, distance:])
            ]
            yield distance, np.stack([*odds, np.ones_like(odds[0])], axis=1)

    def _fit(self, features_N3: np.ndarray, used_N: np.ndarray) -> np.ndarray:
        """Newton's method, starting from the mean of both log-odds."""
        weights = np.array([0.5, 0.5, 0.0])
        for _ in range(self.ITERATIONS):
            p_N = 1 / (1 + np.exp(-(features_N3 @ weights)))
            curvature = (features_N3 * (p_N * (1 - p_N))[:, None]).T @ features_N3
            gradient = features_N3.T @ (used_N - p_N)
            weights = weights + np.linalg.solve(curvature + 1e-3 * np.eye(3), gradient)
        return weights

    def probabilities(self, ahead_TLDE: np.ndarray, this_TLE: np.ndarray) -> np.ndarray:
        """Probabilities of use, float16 [T, L, D, E], laid out as the look-ahead's own."""
        both_TLDE = np.zeros_like(ahead_TLDE)
        for (distance, features), weights in zip(
            self._features(ahead_TLDE, this_TLE), self._weights, strict=True
        ):
            row = both_TLDE[:, :-distance, distance - 1]
            row[...] = (1 / (1 + np.exp(-(features @ weights)))).reshape(row.shape)
        return both_TLDE


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Log-odds of probabilities, float32 and finite."""
    p = np.clip(probability.astype(np.float32), 1e-4, 1 - 1e-4)
    odds: np.ndarray = np.log(p) - np.log1p(-p)
    return odds
