"""The paper's token scheduler (ExpertFlow, arXiv 2410.17954, section 3.3), as a reference.

Two consecutive batches are merged and split anew, in every step, into two groups of equal size
whose tokens take similar routes: S = 1 - Hamming / (L * E) between predicted routes, two medoids,
each moved to the token of the highest mean similarity within its group. The groups then run one
after the other. As in the authors' code, at most 30 iterations and routes of the K likeliest
experts of each layer. Here no keys and values move.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.serving.scheduling.ordering import Ordering
from runtime.serving.sequence import ServedSequence

MAX_ITERATIONS = 30


class Paper(Ordering):
    """Pairs of batches, split by similarity of predicted routes."""

    name = "paper"
    needs_forecasts = True

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._second: list[ServedSequence] = []

    def compose(
        self,
        ready: Sequence[ServedSequence],
        chosen: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        second = [sequence for sequence in self._second if sequence in ready][:count]
        self._second = []
        if second:
            return second
        pair = list(ready[: 2 * count])
        if len(pair) <= count:
            return pair
        routes_NLE = np.stack([self._route(sequence) for sequence in pair])
        first = split(similarity(routes_NLE.reshape(len(pair), -1)))
        self._second = [sequence for sequence, here in zip(pair, first, strict=True) if not here]
        return [sequence for sequence, here in zip(pair, first, strict=True) if here]

    def _route(self, sequence: ServedSequence) -> np.ndarray:
        """Bool [L, E]: the K experts of each layer that the pending token uses most likely."""
        assert sequence.forecast is not None
        logits_LE = sequence.forecast.logits_LE
        route_LE = np.zeros(logits_LE.shape, bool)
        best_LK = np.argpartition(logits_LE, -self._top_k, axis=-1)[:, -self._top_k :]
        np.put_along_axis(route_LE, best_LK, True, axis=-1)
        return route_LE


def similarity(routes_NK: np.ndarray) -> np.ndarray:
    """1 - Hamming distance / length, float [N, N], of bool rows."""
    rows = routes_NK.astype(np.float32)
    used = rows.sum(1)
    distance: np.ndarray = used[:, None] + used[None] - 2 * rows @ rows.T
    return 1 - distance / routes_NK.shape[1]


def split(similarity_NN: np.ndarray) -> np.ndarray:
    """Two groups around medoids: bool [N], true for the first, which holds half (rounded up)."""
    least = int(similarity_NN.argmin())
    medoids = divmod(least, len(similarity_NN))
    first_N = _assign(similarity_NN, *medoids)
    for _ in range(MAX_ITERATIONS):
        moved = _medoid(similarity_NN, first_N), _medoid(similarity_NN, ~first_N)
        if moved == medoids:
            break
        medoids = moved
        first_N = _assign(similarity_NN, *medoids)
    return first_N


def _assign(similarity_NN: np.ndarray, one: int, other: int) -> np.ndarray:
    """The half that is nearer to `one` than to `other`, by the difference."""
    nearest = np.argsort(similarity_NN[other] - similarity_NN[one], kind="stable")
    first_N = np.zeros(len(similarity_NN), bool)
    first_N[nearest[: (len(nearest) + 1) // 2]] = True
    return first_N


def _medoid(similarity_NN: np.ndarray, group_N: np.ndarray) -> int:
    members = np.flatnonzero(group_N)
    return int(members[similarity_NN[np.ix_(members, members)].sum(1).argmax()])
