"""Live prediction: runs the predictor beside the model, one call for each forward pass.

Between passes it keeps, for each sequence, the predictor's keys and values in a ring of `window`
entries (their order does not matter: visibility goes by position) and the true routes of the last
token, which only the model's own pass reveals.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from routing.topology import NO_EXPERT
from runtime.cache.forecast import FAR, Forecast
from runtime.prediction.predictor_file import PredictorFile

PADDING = -1


class Forecaster:
    """Turns token ids into `Forecast`s. Prediction state belongs to one batch at a time."""

    def __init__(self, file: PredictorFile) -> None:
        self.file = file
        self.this_BLE: np.ndarray | None = None
        """Logits of the last token of the last pass, for scoring the prediction."""
        self.reset(0)

    def reset(self, batch_size: int) -> None:
        """Forget everything: `batch_size` new sequences start."""
        file, layers = self.file, self.file.stack
        blocks, heads, width = file.cache_shape
        self._past = np.zeros((blocks, 2, batch_size, heads, file.window, width), np.float32)
        self._past_positions = np.full((batch_size, file.window), PADDING, np.int64)
        self._prompt = np.zeros((2, batch_size, 0), np.int64)
        self._newest = np.zeros((2, batch_size, 0), np.int64)
        self._next_entry = 0
        shape = (batch_size, layers.num_layers, layers.top_k)
        self._last_routes_BLK = np.full(shape, NO_EXPERT, np.int64)

    @property
    def batch_size(self) -> int:
        return len(self._last_routes_BLK)

    def observe(self, routes_BLK: np.ndarray) -> None:
        """The true routes of each sequence's last token, int64, NO_EXPERT where unknown."""
        self._last_routes_BLK = routes_BLK

    def forecast(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> Forecast:
        """Predict for the tokens about to run (int64; position PADDING marks padding).

        A token's probabilities are joined over the batch and, for this step, over its tokens:
        used by any = 1 - product of (1 - p).
        """
        unused_LE = np.ones((), np.float32)
        for heads, valid_BT in self._chunks(token_ids_BT, positions_BT):
            unused_LE = unused_LE * _unused(heads[0], valid_BT)
        self.this_BLE = heads[0][:, -1]
        later = [_unused(head[:, -1:], valid_BT[:, -1:]) for head in heads[1:]]
        if len(later) == 2:  # no head for the far horizon: as if every H tokens were alike
            later.append(later[-1] ** FAR)
        return Forecast(1.0 - unused_LE, *(1.0 - unused for unused in later))

    def _chunks(
        self, token_ids_BT: np.ndarray, positions_BT: np.ndarray
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        run = self._run_cached if self.file.cached else self._run_window
        start = 0
        while start < token_ids_BT.shape[1]:
            span = slice(start, start + self.file.window - self._prompt.shape[-1])
            positions = positions_BT[:, span]
            yield run(token_ids_BT[:, span], positions), positions != PADDING
            start = span.stop

    def _run_cached(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> list[np.ndarray]:
        batch, length = token_ids_BT.shape
        routes = np.full((batch, length, *self._last_routes_BLK.shape[1:]), NO_EXPERT, np.int64)
        routes[:, 0] = self._last_routes_BLK
        self._last_routes_BLK = np.full_like(self._last_routes_BLK, NO_EXPERT)
        feeds = {
            "token_ids": token_ids_BT,
            "routes": routes,
            "positions": positions_BT,
            "past": self._past,
            "past_positions": self._past_positions,
        }
        *heads, present = self.file.session.run([*self.file.outputs, "present"], feeds)
        self._remember(present, positions_BT)
        return heads

    def _remember(self, present: np.ndarray, positions_BT: np.ndarray) -> None:
        length, window = positions_BT.shape[1], self.file.window
        entries = (self._next_entry + np.arange(length)) % window
        self._past[:, :, :, :, entries] = present
        self._past_positions[:, entries] = positions_BT
        self._next_entry = (self._next_entry + length) % window

    def _run_window(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> list[np.ndarray]:
        """A stateless predictor runs again over the prompt's end and the newest tokens.

        The first pass after `reset` brings the prompt, whose end keeps half the window.
        """
        length = token_ids_BT.shape[1]
        tokens = np.stack([token_ids_BT, positions_BT])
        num_prompt = self._prompt.shape[-1] or length
        newest = _last(self._newest, self.file.window - num_prompt - length)
        token_ids, positions = np.concatenate([self._prompt, newest, tokens], -1)
        closed_up = np.arange(positions.shape[1])  # else the prompt would be out of the window
        feeds = {
            "token_ids": np.ascontiguousarray(token_ids),
            "positions": np.where(positions != PADDING, closed_up, PADDING),
            "prompt_lengths": np.full(len(token_ids), num_prompt, np.int64),
        }
        if self._prompt.shape[-1] == 0:
            self._prompt = _last(tokens, self.file.window // 2)
        else:
            self._newest = np.concatenate([newest, tokens], -1)
        heads = self.file.session.run(list(self.file.outputs), feeds)
        return [head[:, -length:] for head in heads]


def _last(array: np.ndarray, count: int) -> np.ndarray:
    """The last `count` entries along the last dimension, or as many as there are."""
    return array[..., max(array.shape[-1] - max(count, 0), 0) :]


def _unused(logits_BTLE: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
    """Probability [L, E] that no valid token uses the expert: the product of sigmoid(-logit).

    NaN counts as unused: whatever a predictor says, its values must compare.
    """
    with np.errstate(over="ignore"):  # surely used: 1 / inf
        unused_BTLE = 1 / (1 + np.exp(logits_BTLE))
    unused_BTLE[~valid_BT] = 1.0
    unused_BTLE[np.isnan(unused_BTLE)] = 1.0
    unused: np.ndarray = unused_BTLE.prod((0, 1))
    return unused
