"""Baselines: trivial predictors that a learned one has to beat.

Each is fitted on traced documents and predicts all heads from the inputs of a predictor's graph:
the token ids so far and the routes of the tokens *before* this one. Logits are those of observed
frequencies: they are calibrated, and the metrics of learned predictors apply.

Symbols: T tokens of a document, J heads, L MoE layers, E experts a layer, R rows of a table.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from predictor.networks.targets import Targets, multi_hot, targets
from predictor.networks.windows import Predictions, PredictorShape, Windows
from routing.predictor_file.format import HEADS
from routing.topology import NO_EXPERT

TABLE_BYTES = 1 << 30
"""Largest size of a token-id table; it leaves out the rarest ids."""


class Baseline(ABC):
    """Counts over documents (batches of one row), turned into logits [1, T, L, E] a head."""

    name: ClassVar[str]
    needs_history: ClassVar[bool] = False

    @abstractmethod
    def count(self, batch: Windows, answers: Targets) -> None:
        """Learn from one document."""

    @abstractmethod
    def __call__(self, batch: Windows) -> Predictions:
        """Predict one document."""


class Frequency(Baseline):
    """Predicts, for every token, the experts that tokens use most."""

    name = "static frequency"

    def __init__(self, shape: PredictorShape) -> None:
        size = (len(HEADS), shape.num_layers, shape.num_experts)
        self.uses_JLE = torch.zeros(size, dtype=torch.int64)
        self.tokens_J = torch.zeros(len(HEADS), dtype=torch.int64)

    def count(self, batch: Windows, answers: Targets) -> None:
        for j, (used_1TLE, valid_1T) in enumerate(answers):
            self.uses_JLE[j] += used_1TLE[valid_1T].sum(0)
            self.tokens_J[j] += valid_1T.sum()

    def rates_JLE(self) -> Tensor:
        """P(a token uses the expert), float32. Half a use is added: no rate is 0 or 1."""
        return ((self.uses_JLE + 0.5) / (self.tokens_J[:, None, None] + 1)).float()

    def __call__(self, batch: Windows) -> Predictions:
        num_tokens = batch.token_ids_BT.shape[1]
        logits_JLE = self.rates_JLE().logit()
        return Predictions(*logits_JLE[:, None, None].expand(-1, 1, num_tokens, -1, -1))


class PreviousToken(Baseline):
    """Predicts the experts of the previous token, and after these the most frequent ones.

    Where they are unknown, as at the first token, it falls back to `Frequency`.
    """

    name = "previous token"
    needs_history = True

    def __init__(self, shape: PredictorShape, frequency: Frequency) -> None:
        self.num_experts = shape.num_experts
        self.frequency = frequency
        size = (2, len(HEADS), shape.num_layers, shape.num_experts)
        self.seen_2JLE = torch.zeros(size, dtype=torch.int64)
        self.uses_2JLE = torch.zeros(size, dtype=torch.int64)

    def count(self, batch: Windows, answers: Targets) -> None:
        known_1T, before_1TLE = self._history(batch)
        for j, (used_1TLE, valid_1T) in enumerate(answers):
            used_TLE, before_TLE = used_1TLE[valid_1T & known_1T], before_1TLE[valid_1T & known_1T]
            for was_used, condition_TLE in enumerate((~before_TLE, before_TLE)):
                self.seen_2JLE[was_used, j] += condition_TLE.sum(0)
                self.uses_2JLE[was_used, j] += (used_TLE & condition_TLE).sum(0)

    def _history(self, batch: Windows) -> tuple[Tensor, Tensor]:
        known_1T = (batch.routes_BTLK != NO_EXPERT).flatten(2).any(-1)
        return known_1T, multi_hot(batch.routes_BTLK, self.num_experts)

    def rates(self) -> tuple[Tensor, Tensor]:
        """P(used | not used before) of each expert, and P(used | used before) of each layer.

        The first stays below the second: the previous token's experts always rank first.
        """
        enters_JLE = (self.uses_2JLE[0] + 0.5) / (self.seen_2JLE[0] + 1)
        stays_JL1 = (self.uses_2JLE[1].sum(-1, keepdim=True) + 0.5) / (
            self.seen_2JLE[1].sum(-1, keepdim=True) + 1
        )
        return enters_JLE.minimum(0.999 * stays_JL1), stays_JL1

    def __call__(self, batch: Windows) -> Predictions:
        known_1T, before_1TLE = self._history(batch)
        enters_JLE, stays_JL1 = (rate.logit() for rate in self.rates())
        fallback = self.frequency(batch)
        return Predictions(
            *(
                torch.where(before_1TLE, stays_L1, enters_LE).where(
                    known_1T[..., None, None], fallback[j]
                )
                for j, (enters_LE, stays_L1) in enumerate(zip(enters_JLE, stays_JL1, strict=True))
            )
        )


class TokenTable(Baseline):
    """Predicts the experts that tokens of the same id use most.

    The frequencies of all tokens count as one more token of each id, so that an unseen id gets
    exactly these. token_ids: the ids to keep, most frequent first, as far as `max_bytes` suffice.
    """

    name = "token-id table"

    def __init__(
        self,
        shape: PredictorShape,
        frequency: Frequency,
        token_ids: np.ndarray,
        max_bytes: int = TABLE_BYTES,
    ) -> None:
        self.frequency = frequency
        size = (len(HEADS), shape.num_layers, shape.num_experts)
        bytes_a_row = 4 * int(np.prod(size))
        kept = torch.from_numpy(token_ids[: max_bytes // bytes_a_row].astype(np.int64))
        self.row_V = torch.full((shape.vocab_size,), len(kept))  # the last row is never counted
        self.row_V[kept] = torch.arange(len(kept))
        self.uses_JRLE = torch.zeros((size[0], len(kept) + 1, *size[1:]), dtype=torch.int32)
        self.tokens_JR = torch.zeros((len(HEADS), len(kept) + 1), dtype=torch.int64)

    def count(self, batch: Windows, answers: Targets) -> None:
        rows_1T = self.row_V[batch.token_ids_BT]
        kept_1T = rows_1T < self.tokens_JR.shape[1] - 1
        for j, (used_1TLE, valid_1T) in enumerate(answers):
            rows_N = rows_1T[valid_1T & kept_1T]
            self.uses_JRLE[j].index_add_(0, rows_N, used_1TLE[valid_1T & kept_1T].int())
            self.tokens_JR[j].index_add_(0, rows_N, torch.ones_like(rows_N))

    def __call__(self, batch: Windows) -> Predictions:
        rows_1T = self.row_V[batch.token_ids_BT]
        prior_JLE = self.frequency.rates_JLE()
        return Predictions(
            *(
                (
                    (self.uses_JRLE[j][rows_1T] + prior_LE)
                    / (self.tokens_JR[j][rows_1T][..., None, None] + 1)
                ).logit()
                for j, prior_LE in enumerate(prior_JLE)
            )
        )


def fit_baselines(documents: Iterable[Windows], shape: PredictorShape) -> list[Baseline]:
    """Fit all baselines on documents, each a batch of one row with known history.

    `documents` is read twice.
    """
    seen_V = np.zeros(shape.vocab_size, np.int64)
    for batch in documents:
        seen_V += np.bincount(batch.token_ids_BT[0].numpy(), minlength=shape.vocab_size)
    by_count = np.argsort(-seen_V, kind="stable")[: np.count_nonzero(seen_V)]
    frequency = Frequency(shape)
    baselines = [
        frequency,
        PreviousToken(shape, frequency),
        TokenTable(shape, frequency, by_count),
    ]
    for batch in documents:
        answers = targets(batch, shape)
        for baseline in baselines:
            baseline.count(batch, answers)
    return baselines
