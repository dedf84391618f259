"""The baselines that a learned predictor has to beat: forecasts from counts, without gradients.

Each is fitted on the documents of a trace. Then it forecasts token by token, as the runtime's
predictor does: for every expert the probabilities of use by this token, by the next, within the
next H and within the next FAR * H. The probabilities are observed frequencies, so that the same
policy can use all of them.

Symbols: N documents, T tokens, L layers, E experts, J = 4 heads, R rows of a table, X = L * E.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from routing.predictor_file.format import FAR
from runtime.cache.forecast import Forecast
from runtime.simulation.trace_steps import TraceStep

Documents = Sequence[Sequence[TraceStep]]
"""Decode steps of one token each, by document."""


def used_by(steps: Sequence[TraceStep], num_experts: int) -> np.ndarray:
    """Bool [T, L, E]: the experts of each token."""
    experts_TLK = np.concatenate([step.experts_TLK for step in steps]).astype(np.int64)
    used = np.zeros((*experts_TLK.shape[:2], num_experts + 1), bool)
    np.put_along_axis(used, np.where(experts_TLK < 0, num_experts, experts_TLK), True, axis=-1)
    return used[..., :num_experts]


def answers(used_TLE: np.ndarray, horizon: int) -> Iterator[np.ndarray]:
    """The targets of the four heads, bool [T, L, E] each. Beyond the document nothing is used."""
    yield used_TLE
    zeros = np.zeros((1, *used_TLE.shape[1:]), np.int32)
    counts = np.concatenate([zeros, np.cumsum(used_TLE, axis=0, dtype=np.int32)])
    last, first_T = len(used_TLE), np.arange(len(used_TLE)) + 1
    for ahead in (1, horizon, FAR * horizon):
        yield counts[np.minimum(first_T + ahead, last)] > counts[first_T]


class Baseline(ABC):
    """A forecast from counts, made token by token for one document at a time."""

    name: ClassVar[str]

    def reset(self) -> None:  # noqa: B027 - most keep nothing between tokens
        """Start a new document."""

    @abstractmethod
    def forecast(self, token_id: int) -> Forecast:
        """The probabilities of use, as known before the token runs."""

    def observe(self, used_LE: np.ndarray) -> None:  # noqa: B027 - most learn nothing
        """Take note of the experts (bool) that the token has used."""


class StaticSet(Baseline):
    """A fixed hot set: the rates of use over all tokens."""

    name = "static hot set"

    def __init__(self, documents: Documents, num_experts: int, horizon: int) -> None:
        total, sums = 0, [np.float32(0)] * 4
        for steps in documents:
            used_TLE = used_by(steps, num_experts)
            sums = [s + a.sum(0) for s, a in zip(sums, answers(used_TLE, horizon), strict=True)]
            total += len(used_TLE)
        self.rates_JLE = (np.stack(sums).astype(np.float32) + 0.5) / (total + 1)

    def forecast(self, token_id: int) -> Forecast:
        return Forecast(*self.rates_JLE)


class PreviousToken(Baseline):
    """Reuse of the last token's experts.

    Experts that the last token used stay in use at one rate a layer. All others enter at their own.
    """

    name = "previous token"

    def __init__(
        self, documents: Documents, num_experts: int, horizon: int, base: Baseline
    ) -> None:
        self._base = base
        uses, seen = np.zeros(()), np.zeros(())
        for steps in documents:
            used_TLE = used_by(steps, num_experts)
            for_each = [a[1:] for a in answers(used_TLE, horizon)]
            before = used_TLE[:-1]
            states = (~before, before)
            uses = uses + np.stack([[(a & s).sum(0) for a in for_each] for s in states])
            seen = seen + np.stack([s.sum(0) for s in states])
        enters_JLE = (uses[0] + 0.5) / (seen[0] + 1)
        stays_JL1 = (uses[1].sum(-1) + 0.5)[..., None] / (seen[1].sum(-1) + 1)[:, None]
        self._enters_JLE, self._stays_JL1 = enters_JLE.astype(np.float32), stays_JL1
        self._last_LE: np.ndarray | None = None

    def reset(self) -> None:
        self._last_LE = None

    def forecast(self, token_id: int) -> Forecast:
        if self._last_LE is None:
            return self._base.forecast(token_id)
        return Forecast(*np.where(self._last_LE, self._stays_JL1, self._enters_JLE))

    def observe(self, used_LE: np.ndarray) -> None:
        self._last_LE = used_LE


class TokenTable(Baseline):
    """The rates of use by tokens of the same id, or by all tokens for an id never seen."""

    name = "token table"

    def __init__(
        self, documents: Documents, num_experts: int, horizon: int, base: StaticSet
    ) -> None:
        ids = np.unique([int(step.token_ids_T[0]) for steps in documents for step in steps])
        self._row_of = {int(token): row for row, token in enumerate(ids)}
        shape = base.rates_JLE.shape
        sums = np.zeros((len(ids), *shape), np.float32)
        counts = np.zeros(len(ids), np.float32)
        for steps in documents:
            rows_T = np.array([self._row_of[int(step.token_ids_T[0])] for step in steps])
            np.add.at(counts, rows_T, 1)
            for j, answer in enumerate(answers(used_by(steps, num_experts), horizon)):
                np.add.at(sums[:, j], rows_T, answer.astype(np.float32))
        sums += base.rates_JLE
        sums /= (counts + 1)[:, None, None, None]
        self._rates_RJLE, self._base = sums, base

    def forecast(self, token_id: int) -> Forecast:
        row = self._row_of.get(token_id)
        return self._base.forecast(token_id) if row is None else Forecast(*self._rates_RJLE[row])


class NearestMaps(Baseline):
    """A vote of the traced tokens whose recently used experts are most like this token's.

    After MoE-Infinity (arXiv 2401.14361) and FineMoE (2502.05370): a library of expert activation
    maps of traced sequences, here exponentially fading sums of the uses. The NEIGHBOURS nearest by
    cosine similarity vote.
    """

    name = "nearest maps"
    DECAY = 0.7
    NEIGHBOURS = 32
    LIBRARY = 4096

    def __init__(
        self, documents: Documents, num_experts: int, horizon: int, base: Baseline
    ) -> None:
        self._base = base
        maps, outcomes = [], []
        for steps in documents:
            used_TLE = used_by(steps, num_experts)
            all_answers = np.stack(list(answers(used_TLE, horizon)), 1)
            self.reset()
            for used_LE, answer_JLE in zip(used_TLE, all_answers, strict=True):
                if self._map_X is not None:
                    maps.append(_unit(self._map_X))
                    outcomes.append(answer_JLE)
                self.observe(used_LE)
        chosen = np.random.default_rng(0).permutation(len(maps))[: self.LIBRARY]
        self._maps_RX = np.stack([maps[i] for i in chosen]).astype(np.float32)
        self._outcomes_RJLE = np.stack([outcomes[i] for i in chosen])
        self.reset()

    def reset(self) -> None:
        self._map_X: np.ndarray | None = None

    def forecast(self, token_id: int) -> Forecast:
        if self._map_X is None:
            return self._base.forecast(token_id)
        similarity_R = self._maps_RX @ _unit(self._map_X)
        nearest = np.argpartition(-similarity_R, min(self.NEIGHBOURS, len(similarity_R) - 1))
        votes_JLE = self._outcomes_RJLE[nearest[: self.NEIGHBOURS]].mean(0, dtype=np.float32)
        prior = np.stack(self._base.forecast(token_id)[:4])
        return Forecast(*((self.NEIGHBOURS * votes_JLE + prior) / (self.NEIGHBOURS + 1)))

    def observe(self, used_LE: np.ndarray) -> None:
        used_X = used_LE.reshape(-1).astype(np.float32)
        self._map_X = used_X if self._map_X is None else self.DECAY * self._map_X + used_X


def _unit(vector: np.ndarray) -> np.ndarray:
    """The vector at length 1; a zero vector as it is."""
    unit: np.ndarray = vector / max(float(np.linalg.norm(vector)), 1e-9)
    return unit


def fit_baselines(documents: Documents, num_experts: int, horizon: int) -> list[Baseline]:
    """All baselines, fitted on documents that are decoded token by token."""
    static = StaticSet(documents, num_experts, horizon)
    return [
        static,
        PreviousToken(documents, num_experts, horizon, static),
        TokenTable(documents, num_experts, horizon, static),
        NearestMaps(documents, num_experts, horizon, static),
    ]
