"""The sequence forecaster: prediction for sequences that come and go, each with a past of its own.

`forecaster` predicts for one batch that starts and ends together. Here the predictor reads each
generated token right after it is chosen, so that its experts are known before the scheduler decides
which sequences join the next step. A prompt is read when it may first be admitted, and again if it
is admitted later: the pasts of all waiting sequences could take more memory than the resident
experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from routing.predictor_file.driver import Past, not_used, run_step, run_steps
from routing.predictor_file.reader import PredictorFile
from routing.topology import NO_EXPERT
from runtime.cache.forecast import Forecast
from runtime.prediction.session_memory import (
    MOST_SEQUENCES,
    Cue,
    SessionMemory,
    join_recalled,
)


class SequenceForecast(NamedTuple):
    """Prediction for one sequence: float32 probabilities [L, E] that an expert is NOT used."""

    unused_LE: np.ndarray
    """By the pending tokens."""
    unused_later_HLE: np.ndarray
    """By the token after them, within the horizon after them, and within the far horizon."""
    logits_LE: np.ndarray
    """The last pending token's logits of use, for scoring the prediction."""
    mean_use_LE: np.ndarray
    """Mean probability that a token of this sequence's prompt uses the expert."""
    cue: Cue | None = None
    """The last pending token, as the session memory knows it."""
    recalled_2HLE: np.ndarray | None = None
    """Probabilities [2, 4, L, E] that an expert IS used, by what the session memory recalls."""

    def stale(self) -> SequenceForecast:
        """As a forecast for the token after the pending ones, whose id is not known yet."""
        recalled_2HLE = self.recalled_2HLE
        if recalled_2HLE is not None:
            recalled_2HLE = recalled_2HLE[:, [1, 1, 2, 3]]
        return self._replace(unused_LE=self.unused_later_HLE[0], recalled_2HLE=recalled_2HLE)

    def brief(self) -> SequenceForecast:
        """The part that admission needs, in half precision, since many sequences may wait."""
        nothing = np.empty(0, np.float16)
        unused_LE, mean_use_LE = (
            self.unused_LE.astype(np.float16),
            self.mean_use_LE.astype(np.float16),
        )
        return SequenceForecast(unused_LE, nothing, nothing, mean_use_LE)


class SequenceForecaster:
    """Runs the predictor over sequences that each have a `Past`."""

    def __init__(self, file: PredictorFile) -> None:
        if not file.cached:
            raise ValueError(
                "serving predicts token by token, which needs a key/value cache, and this "
                "predictor has none; export a causal one"
            )
        self.file = file
        self.memory = SessionMemory(file.stack, file.horizon)

    def read_prompt(self, past: Past, token_ids: Sequence[int]) -> SequenceForecast:
        """Predict for a whole prompt, and add it to `past`."""
        unused_LE, mean_use_LE = np.ones((), np.float32), np.zeros((), np.float32)
        for start in range(0, len(token_ids), past.size):
            chunk_1T = np.array([token_ids[start : start + past.size]], np.int64)
            positions_1T = past.length + np.arange(chunk_1T.shape[1])[None]
            routes = self._no_routes(chunk_1T.shape)
            this, *later = run_step(self.file, past, chunk_1T, routes, positions_1T)
            unused_TLE = not_used(this[0])
            unused_LE = unused_LE * unused_TLE.prod(0)
            mean_use_LE = mean_use_LE + (1 - unused_TLE).sum(0) / len(token_ids)
        unused_later_HLE = not_used(np.stack([head[0, -1] for head in later]))
        cue = self.memory.cue(None, int(token_ids[-1]), later[0][0, -1])
        recalled = self.memory.recall(cue)
        return SequenceForecast(
            unused_LE, unused_later_HLE, this[0, -1], mean_use_LE, cue, recalled
        )

    def step(
        self,
        pasts: Sequence[Past],
        token_ids: Sequence[int],
        routes_BLK: np.ndarray,
        before: Sequence[SequenceForecast],
    ) -> list[SequenceForecast]:
        """Predict for one new token of each sequence, given the routes of the token before it.

        routes_BLK: int64, NO_EXPERT where unknown. before: the sequences' last forecasts.
        """
        token_ids_B1 = np.array(token_ids, np.int64)[:, None]
        this, *later = run_steps(self.file, pasts, token_ids_B1, routes_BLK[:, None])
        recalls = len(pasts) <= MOST_SEQUENCES
        forecasts = []
        for index, (old, token) in enumerate(zip(before, token_ids, strict=True)):
            cue = None
            if recalls:
                cue = self._next_cue(old, token, routes_BLK[index], later[0][index, 0])
            forecasts.append(
                SequenceForecast(
                    not_used(this[index, 0]),
                    not_used(np.stack([head[index, 0] for head in later])),
                    this[index, 0],
                    old.mean_use_LE,
                    cue,
                    None if cue is None else self.memory.recall(cue),
                )
            )
        return forecasts

    def _next_cue(
        self,
        old: SequenceForecast,
        token: int,
        routes_LK: np.ndarray,
        next_logits_LE: np.ndarray,
    ) -> Cue:
        """Remember the last token's routes, and return the cue of the new one."""
        place = None if old.cue is None else self.memory.add(old.cue, routes_LK)
        return self.memory.cue(place, token, next_logits_LE)

    def _no_routes(self, shape: tuple[int, ...]) -> np.ndarray:
        stack = self.file.stack
        return np.full((*shape, stack.num_layers, stack.top_k), NO_EXPERT, np.int64)


def join(forecasts: Sequence[SequenceForecast]) -> Forecast | None:
    """The probabilities that any of the sequences uses an expert; None without sequences."""
    if not forecasts:
        return None
    used_LE = 1 - np.prod([forecast.unused_LE for forecast in forecasts], axis=0)
    unused_later = np.prod([forecast.unused_later_HLE for forecast in forecasts], axis=0)
    recalled = [f.recalled_2HLE for f in forecasts if f.recalled_2HLE is not None]
    is_whole = len(recalled) == len(forecasts) <= MOST_SEQUENCES
    remembered = join_recalled(recalled) if is_whole else None
    return Forecast(used_LE, *(1 - unused_later))._replace(remembered=remembered)
