"""The forecaster: live prediction for one batch that starts and ends together.

Between forward passes it keeps the predictor's past of the batch, and the true routes of each
sequence's last token, which only the model's own pass reveals. What they were is remembered beyond
the batch (`session_memory`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from routing.predictor_file.driver import Heads, Past, not_used, run_step, run_window
from routing.predictor_file.format import PADDING
from routing.predictor_file.reader import PredictorFile
from routing.topology import NO_EXPERT
from runtime.cache.forecast import Forecast
from runtime.prediction.session_memory import (
    MOST_SEQUENCES,
    Cue,
    Place,
    SessionMemory,
    join_recalled,
)


class Forecaster:
    """Turns token ids into `Forecast`s, for one batch at a time."""

    def __init__(self, file: PredictorFile) -> None:
        self.file = file
        self.this_BLE: np.ndarray | None = None
        """Logits of each sequence's last token in the last pass, for scoring the prediction."""
        self.memory = SessionMemory(file.stack, file.horizon)
        self._observed_BLK: np.ndarray | None = None
        """Routes that the memory does not know yet."""
        self._running: dict[int, Cue] = {}
        """The last token of each sequence whose routes are not known yet."""
        self._places: list[Place] = []
        self.reset(0)

    def reset(self, batch_size: int) -> None:
        """Start `batch_size` new sequences and forget the others, but for what the memory holds."""
        self._remember()
        stack = self.file.stack
        self._past = Past(self.file, batch_size)
        self._prompt = np.zeros((2, batch_size, 0), np.int64)
        self._newest = np.zeros((2, batch_size, 0), np.int64)
        shape = (batch_size, stack.num_layers, stack.top_k)
        self._last_routes_BLK = np.full(shape, NO_EXPERT, np.int64)
        self._places = [None] * batch_size
        self._running = {}
        self._recalled: dict[int, np.ndarray] | None = None
        """By sequence, what the places of the same token say; None: not looked up yet."""

    @property
    def batch_size(self) -> int:
        """Sequences of the running batch."""
        return len(self._last_routes_BLK)

    def observe(self, routes_BLK: np.ndarray) -> None:
        """Take the true routes of each sequence's last token, int64, NO_EXPERT where unknown."""
        self._remember()
        self._last_routes_BLK = self._observed_BLK = routes_BLK

    def forecast(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> Forecast:
        """Predict for the tokens that run next (int64; position PADDING marks padding)."""
        self.look_up(token_ids_BT, positions_BT)
        forecast = self.predict(token_ids_BT, positions_BT)
        return forecast._replace(remembered=self.recall())

    def predict(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> Forecast:
        """The first half of `forecast`: what the predictor says.

        Probabilities are joined over the batch and, for this step, over all its tokens:
        P(used by any) = 1 - product of (1 - p).
        """
        unused_LE = np.ones((), np.float32)
        for heads, valid_BT in self._chunks(token_ids_BT, positions_BT):
            unused_LE = unused_LE * _used_by_none(heads[0], valid_BT)
        self.this_BLE, self._next_BLE = heads[0][:, -1], heads[1][:, -1]
        later = [_used_by_none(head[:, -1:], valid_BT[:, -1:]) for head in heads[1:]]
        return Forecast(1.0 - unused_LE, *(1.0 - unused for unused in later))

    def look_up(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> None:
        """What of the memory's work needs no prediction: it may be done beside `predict`."""
        self._remember()
        if token_ids_BT.shape[1] > 1 or self._running:  # the routes in between are not known
            self._places = [None] * len(token_ids_BT)
        self._running = {}
        self._tokens_B = token_ids_BT[:, -1].tolist()
        rows = np.flatnonzero(positions_BT[:, -1] != PADDING).tolist()
        self._recalled = {
            row: self.memory.recall_same(self._places[row], self._tokens_B[row])
            for row in (rows if len(rows) <= MOST_SEQUENCES else ())
        }

    def recall(self) -> np.ndarray | None:
        """The second half of `forecast`, after `predict` and `look_up`: what followed the like
        before, for any of the sequences; None for too many.
        """
        assert self._recalled is not None
        recalled, self._recalled = self._recalled, None
        self._running = {
            row: self.memory.cue(self._places[row], self._tokens_B[row], self._next_BLE[row])
            for row in recalled
        }
        if not recalled:
            return None
        return join_recalled(
            [
                np.stack([same, self.memory.recall_alike(self._running[row])])
                for row, same in recalled.items()
            ]
        )

    def _remember(self) -> None:
        """Put the observed routes into the memory."""
        if self._observed_BLK is not None:
            for row, cue in self._running.items():
                self._places[row] = self.memory.add(cue, self._observed_BLK[row])
            self._running, self._observed_BLK = {}, None

    def _chunks(
        self, token_ids_BT: np.ndarray, positions_BT: np.ndarray
    ) -> Iterator[tuple[Heads, np.ndarray]]:
        run = self._run_cached if self.file.cached else self._run_window
        start = 0
        while start < token_ids_BT.shape[1]:
            span = slice(start, start + self.file.window - self._prompt.shape[-1])
            positions = positions_BT[:, span]
            yield run(token_ids_BT[:, span], positions), positions != PADDING
            start = span.stop

    def _run_cached(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> Heads:
        routes = np.full(
            (*token_ids_BT.shape, *self._last_routes_BLK.shape[1:]), NO_EXPERT, np.int64
        )
        routes[:, 0] = self._last_routes_BLK
        self._last_routes_BLK = np.full_like(self._last_routes_BLK, NO_EXPERT)
        return run_step(self.file, self._past, token_ids_BT, routes, positions_BT)

    def _run_window(self, token_ids_BT: np.ndarray, positions_BT: np.ndarray) -> Heads:
        """Run a predictor without a cache over the end of the prompt and the newest tokens.

        The first pass after `reset` brings the prompt; its end keeps half of the window.
        """
        length = token_ids_BT.shape[1]
        tokens = np.stack([token_ids_BT, positions_BT])
        num_prompt = self._prompt.shape[-1] or length
        newest = _last(self._newest, self.file.window - num_prompt - length)
        token_ids, positions = np.concatenate([self._prompt, newest, tokens], -1)
        closed_up = np.arange(positions.shape[1])  # else the prompt would leave the window
        if self._prompt.shape[-1] == 0:
            self._prompt = _last(tokens, self.file.window // 2)
        else:
            self._newest = np.concatenate([newest, tokens], -1)
        heads = run_window(
            self.file,
            np.ascontiguousarray(token_ids),
            np.where(positions != PADDING, closed_up, PADDING),
            np.full(len(token_ids), num_prompt, np.int64),
        )
        return [head[:, -length:] for head in heads]


def _last(array: np.ndarray, count: int) -> np.ndarray:
    """The last `count` entries along the last dimension, or as many as there are."""
    return array[..., max(array.shape[-1] - max(count, 0), 0) :]


def _used_by_none(logits_BTLE: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
    """Probability [L, E] that no valid token uses the expert."""
    unused_BTLE = not_used(logits_BTLE)
    unused_BTLE[~valid_BT] = 1.0
    unused: np.ndarray = unused_BTLE.prod((0, 1))
    return unused
