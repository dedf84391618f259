"""The driver of a predictor's graph: feeds it, and keeps its past keys and values.

B sequences, T new tokens, P past entries, L MoE layers, E experts a layer, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routing.predictor_file.format import FAR, HEADS, PADDING, PRESENT
from routing.predictor_file.reader import PredictorFile

Heads = list[np.ndarray]
"""The logits of each of HEADS, float32 [B, T, L, E]."""


class Past:
    """Keys and values of the newest tokens of B sequences, in a ring of `size` entries.

    Their order does not matter: a token sees entries by their positions.

        past        float32 [blocks, 2, B, heads, size, head_dim]
        positions   int64 [B, size], PADDING where an entry is empty
    """

    def __init__(self, file: PredictorFile, batch: int, size: int | None = None) -> None:
        """size: at most this many entries; the file's window by default and at most."""
        blocks, heads, width = file.cache_shape
        self.size = file.window if size is None else min(file.window, size)
        self.past = np.zeros((blocks, 2, batch, heads, self.size, width), np.float32)
        self.positions = np.full((batch, self.size), PADDING, np.int64)
        self.length = 0
        """Tokens that have been added."""

    @property
    def used(self) -> int:
        """Entries that hold a token."""
        return min(self.length, self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.past.nbytes

    def add(self, present: np.ndarray, positions_BT: np.ndarray) -> None:
        """Add the keys and values of T new tokens, [blocks, 2, B, heads, T, head_dim]."""
        count = positions_BT.shape[1]
        entries = (self.length + np.arange(count)) % self.size
        self.past[:, :, :, :, entries] = present
        self.positions[:, entries] = positions_BT
        self.length += count


def run_step(
    file: PredictorFile,
    past: Past,
    token_ids_BT: np.ndarray,
    routes_BTLK: np.ndarray,
    positions_BT: np.ndarray,
) -> Heads:
    """Predict for T new tokens of B sequences, at most `past.size` each, and add them to `past`.

    token_ids_BT, positions_BT: int64. routes_BTLK: int64, the true routes of each token's
    predecessor, NO_EXPERT where unknown.
    """
    given = token_ids_BT, routes_BTLK, positions_BT
    heads, present = _run(file, given, past.past, past.positions)
    past.add(present, positions_BT)
    return heads


def run_steps(
    file: PredictorFile,
    pasts: Sequence[Past],
    token_ids_B1: np.ndarray,
    routes_B1LK: np.ndarray,
) -> Heads:
    """Predict for one new token of each of B sequences, and add it to the sequence's own past."""
    positions_B1 = np.array([[past.length] for past in pasts])
    given = token_ids_B1, routes_B1LK, positions_B1
    heads, present = _run(file, given, *_side_by_side(pasts))
    for index, past in enumerate(pasts):
        past.add(present[:, :, index : index + 1], positions_B1[index : index + 1])
    return heads


def run_window(
    file: PredictorFile,
    token_ids_BT: np.ndarray,
    positions_BT: np.ndarray,
    prompt_lengths_B: np.ndarray,
) -> Heads:
    """Predict for all T tokens of a window, with a graph that has no key/value cache.

    prompt_lengths_B: int64, the leading columns of each row that are prompt.
    """
    feeds = {
        "token_ids": token_ids_BT,
        "positions": positions_BT,
        "prompt_lengths": prompt_lengths_B,
    }
    return _all_heads(file.session.run(list(file.outputs), feeds))


def _run(
    file: PredictorFile,
    given: tuple[np.ndarray, np.ndarray, np.ndarray],
    past: np.ndarray,
    past_positions: np.ndarray,
) -> tuple[Heads, np.ndarray]:
    token_ids, routes, positions = given
    feeds = {
        "token_ids": token_ids,
        "routes": routes,
        "positions": positions,
        "past": past,
        "past_positions": past_positions,
    }
    *heads, present = file.session.run([*file.outputs, PRESENT], feeds)
    return _all_heads(heads), present


def _side_by_side(pasts: Sequence[Past]) -> tuple[np.ndarray, np.ndarray]:
    """The used entries of all pasts as one batch; PADDING fills up the shorter ones."""
    used = max(past.used for past in pasts)
    blocks, two, _, heads, _, width = pasts[0].past.shape
    joined = np.zeros((blocks, two, len(pasts), heads, used, width), np.float32)
    positions = np.full((len(pasts), used), PADDING, np.int64)
    for index, past in enumerate(pasts):
        joined[:, :, index, :, : past.used] = past.past[:, :, 0, :, : past.used]
        positions[index, : past.used] = past.positions[0, : past.used]
    return joined, positions


def _all_heads(heads: Heads) -> Heads:
    """All of HEADS. A file without a far head gets one: FAR independent near horizons."""
    return heads if len(heads) == len(HEADS) else [*heads, _repeated(heads[-1], FAR)]


def _repeated(logits: np.ndarray, times: int) -> np.ndarray:
    """The logit of 1 - (1 - p) ** n: at least one success in n = `times` independent tries.

    With p = sigmoid(logit) and s = n * softplus(logit) = -log((1 - p) ** n), it is
    log(exp(s) - 1).
    """
    s = times * np.logaddexp(0, logits)
    with np.errstate(divide="ignore"):  # log(exp(0) - 1): surely unused
        repeated: np.ndarray = np.where(s > 30, s, np.log(np.expm1(np.minimum(s, 30))))
    return repeated.astype(np.float32)


def not_used(logits: np.ndarray) -> np.ndarray:
    """1 - sigmoid, float32: the probability that an expert is not used.

    NaN counts as not used: a policy must be able to compare values, whatever a predictor answers.
    """
    with np.errstate(over="ignore"):  # surely used: 1 / inf
        unused: np.ndarray = 1 / (1 + np.exp(logits))
    unused[np.isnan(unused)] = 1.0
    return unused
