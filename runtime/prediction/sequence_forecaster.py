"""Prediction for sequences that come and go: each keeps its own history.

`runtime.prediction.forecaster` predicts for one batch that starts and ends together. Here each
generated token is predicted from right after it is chosen, so what the next step would use is known
before the scheduler decides who joins it. A prompt is read when it may first be admitted, and again
when it is admitted later: the predictor's keys and values of all who wait could take more memory than the
resident experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from routing.topology import NO_EXPERT
from runtime.cache.forecast import FAR, Forecast
from runtime.prediction.forecaster import PADDING
from runtime.prediction.predictor_file import PredictorFile


class SequenceForecast(NamedTuple):
    """Prediction for one sequence: float32 [L, E] probabilities that an expert is NOT used."""

    this_LE: np.ndarray
    """by the pending tokens"""
    later_HLE: np.ndarray
    """by the token after them, within the horizon after them, and within the far horizon"""
    logits_LE: np.ndarray
    """Of the last pending token, for scoring the prediction."""
    mean_use_LE: np.ndarray
    """Probability that a token of this sequence uses the expert: the mean over its prompt."""

    def stale(self) -> SequenceForecast:
        """As the outlook of the token after the pending ones, whose id is not known to it."""
        return self._replace(this_LE=self.later_HLE[0])

    def brief(self) -> SequenceForecast:
        """What admission asks for, in half precision: many wait, and each should take few bytes."""
        nothing = np.empty(0, np.float16)
        this_LE, mean_use_LE = self.this_LE.astype(np.float16), self.mean_use_LE.astype(np.float16)
        return SequenceForecast(this_LE, nothing, nothing, mean_use_LE)


class PredictorHistory:
    """The predictor's memory of one sequence: a ring of keys and values, in any order."""

    def __init__(self, file: PredictorFile, limit: int) -> None:
        blocks, heads, width = file.cache_shape
        size = min(file.window, limit)
        self.past = np.zeros((blocks, 2, heads, size, width), np.float32)
        self.positions = np.full(size, PADDING, np.int64)
        self.length = 0

    @property
    def used(self) -> int:
        return min(self.length, len(self.positions))

    def add(self, present: np.ndarray, count: int) -> None:
        """Take in the newest `count` tokens, [blocks, 2, heads, count, width]."""
        positions = np.arange(self.length, self.length + count)
        self.past[:, :, :, positions % len(self.positions)] = present
        self.positions[positions % len(self.positions)] = positions
        self.length += count


class SequenceForecaster:
    """Runs the predictor over sequences that each have a `History`."""

    def __init__(self, file: PredictorFile) -> None:
        if not file.cached:
            raise ValueError(
                "serving predicts token by token, which this predictor cannot (it has no "
                "key/value cache); export a causal one"
            )
        self.file = file

    def read_prompt(self, history: PredictorHistory, token_ids: Sequence[int]) -> SequenceForecast:
        """Predict for a whole prompt."""
        unused_LE, mean_use_LE = np.ones((), np.float32), np.zeros((), np.float32)
        for start in range(0, len(token_ids), len(history.positions)):
            chunk = np.array([token_ids[start : start + len(history.positions)]], np.int64)
            this, *later = self._run([history], chunk, self._no_routes(chunk.shape))
            unused_TLE = _unused(this[0])
            unused_LE = unused_LE * unused_TLE.prod(0)
            mean_use_LE = mean_use_LE + (1 - unused_TLE).sum(0) / len(token_ids)
        return SequenceForecast(
            unused_LE, _later([head[0, -1] for head in later]), this[0, -1], mean_use_LE
        )

    def step(
        self,
        histories: Sequence[PredictorHistory],
        token_ids: Sequence[int],
        routes_BLK: np.ndarray,
        before: Sequence[SequenceForecast],
    ) -> list[SequenceForecast]:
        """Predict for one new token of each sequence, given the routes of the one before it."""
        token_ids_B1 = np.array(token_ids, np.int64)[:, None]
        this, *later = self._run(histories, token_ids_B1, routes_BLK[:, None])
        return [
            SequenceForecast(
                _unused(this[index, 0]),
                _later([head[index, 0] for head in later]),
                this[index, 0],
                old.mean_use_LE,
            )
            for index, old in enumerate(before)
        ]

    def _no_routes(self, shape: tuple[int, ...]) -> np.ndarray:
        stack = self.file.stack
        return np.full((*shape, stack.num_layers, stack.top_k), NO_EXPERT, np.int64)

    def _run(
        self, histories: Sequence[PredictorHistory], token_ids_BT: np.ndarray, routes: np.ndarray
    ) -> list[np.ndarray]:
        count = token_ids_BT.shape[1]
        starts_B1 = np.array([[history.length] for history in histories])
        past, past_positions = _stack(histories)
        feeds = {
            "token_ids": token_ids_BT,
            "routes": routes,
            "positions": starts_B1 + np.arange(count),
            "past": past,
            "past_positions": past_positions,
        }
        *heads, present = self.file.session.run([*self.file.outputs, "present"], feeds)
        for index, history in enumerate(histories):
            history.add(present[:, :, index], count)
        return heads


def _stack(histories: Sequence[PredictorHistory]) -> tuple[np.ndarray, np.ndarray]:
    """The used entries of all histories as one batch, the shorter ones filled up."""
    used = max(history.used for history in histories)
    blocks, two, heads, _, width = histories[0].past.shape
    past = np.zeros((blocks, two, len(histories), heads, used, width), np.float32)
    positions = np.full((len(histories), used), PADDING, np.int64)
    for index, history in enumerate(histories):
        past[:, :, index, :, : history.used] = history.past[:, :, :, : history.used]
        positions[index, : history.used] = history.positions[: history.used]
    return past, positions


def join(forecasts: Sequence[SequenceForecast]) -> Forecast | None:
    """What any of the sequences uses; None where nothing is predicted."""
    if not forecasts:
        return None
    this_LE = 1 - np.prod([forecast.this_LE for forecast in forecasts], axis=0)
    return Forecast(this_LE, *(1 - np.prod([forecast.later_HLE for forecast in forecasts], axis=0)))


def _later(heads: Sequence[np.ndarray]) -> np.ndarray:
    """The heads that look ahead; without one for the far horizon, every H tokens are alike."""
    unused = [_unused(logits_LE) for logits_LE in heads]
    return np.stack(unused if len(unused) == 3 else [*unused, unused[-1] ** FAR])


def _unused(logits: np.ndarray) -> np.ndarray:
    """1 - sigmoid; NaN counts as unused: whatever a predictor says, its values must compare."""
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is right
        return np.asarray(1 / (1 + np.exp(np.nan_to_num(logits, nan=-np.inf))), np.float32)
