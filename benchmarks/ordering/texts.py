"""Texts cut out of a trace, with what a predictor says of each of their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.replay.recorded_requests import Recorded
from routing.predictor_file.driver import Past, not_used, run_step
from routing.predictor_file.reader import PredictorFile
from routing.topology import NO_EXPERT
from runtime.prediction.sequence_forecaster import SequenceForecast

TOGETHER = 32
"""Texts that the predictor reads side by side."""
NOTHING = np.empty(0, np.float16)


class Foretold(NamedTuple):
    """A text, and for its prompt and every token after it what is known before it runs."""

    recorded: Recorded
    num_prompt: int
    unused_NLE: np.ndarray
    """Probability, float16, that the prompt (N = 0) or the n-th new token does not use it."""
    later_NHLE: np.ndarray
    """The same of the tokens after it."""
    mean_use_LE: np.ndarray
    """Mean use of the prompt's tokens."""

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.recorded.token_ids_T)

    def forecast(self, at: int) -> SequenceForecast:
        """The forecast before new token number `at`, in single precision as it is served."""
        return SequenceForecast(
            self.unused_NLE[at].astype(np.float32), self.later_NHLE[at].astype(np.float32),
            NOTHING, self.mean_use_LE,
        )  # fmt: skip


def foretell(file: PredictorFile, texts: Sequence[Recorded], num_prompt: int) -> Iterator[Foretold]:
    """The texts, all of one length, as serving reads them: a prompt whose routes are not known,
    then token after token with the routes of the one before.
    """
    for first in range(0, len(texts), TOGETHER):
        some = texts[first : first + TOGETHER]
        tokens_BT = np.stack([text.token_ids_T for text in some]).astype(np.int64)
        routes_BTLK = np.stack([text.experts_TLK for text in some]).astype(np.int64)
        known_BTLK = np.roll(routes_BTLK, 1, axis=1)
        known_BTLK[:, :num_prompt] = NO_EXPERT
        positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
        past = Past(file, len(some))
        spans = slice(0, num_prompt), slice(num_prompt, None)
        prompt, new = (
            [
                not_used(head)
                for head in run_step(
                    file, past, tokens_BT[:, span], known_BTLK[:, span], positions_BT[:, span]
                )
            ]
            for span in spans
        )
        for index, text in enumerate(some):
            unused = [prompt[0][index].prod(0, keepdims=True), new[0][index]]
            later = [
                np.stack([head[index] for head in heads[1:]], axis=1)
                for heads in ([head[:, -1:] for head in prompt], new)
            ]
            yield Foretold(
                text, num_prompt, np.concatenate(unused).astype(np.float16),
                np.concatenate(later).astype(np.float16), (1 - prompt[0][index]).mean(0),
            )  # fmt: skip


def true_forecast(text: Foretold, at: int) -> SequenceForecast:
    """What the ordering would read if every route were known."""
    routes_TLK = text.recorded.experts_TLK
    prompt = _unused(routes_TLK[: text.num_prompt], text.mean_use_LE.shape)
    pending = prompt.prod(0) if at == 0 else 1 - _used(routes_TLK[text.num_prompt + at - 1], prompt)
    return SequenceForecast(pending, NOTHING, NOTHING, 1 - prompt.mean(0))


def _unused(routes_TLK: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """1 where a token does not use an expert, float32 [T, L, E]."""
    unused_TLE = np.ones((len(routes_TLK), *shape), np.float32)
    np.put_along_axis(unused_TLE, routes_TLK.astype(np.int64), 0.0, axis=-1)
    return unused_TLE


def _used(routes_LK: np.ndarray, like_TLE: np.ndarray) -> np.ndarray:
    used_LE: np.ndarray = 1 - _unused(routes_LK[None], like_TLE.shape[1:])[0]
    return used_LE
