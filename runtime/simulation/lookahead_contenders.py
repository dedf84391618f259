"""Contenders that predict the experts of coming layers while a step runs.

They read the look-aheads in a trace ("gate": `trace.collect --lookahead`; "mlp" and "linear":
`predictor.layer_ahead`). These say nothing of a step before its first layer, nor of later tokens.
So the contenders evict by predicted reuse without a forecast: past uses, fading as LFU's do, stand
in place of the heads. The experts predicted for the next 1 to D layers are protected as soon as the
router input of this layer exists, and only those are prefetched. In this model the gates or
networks themselves take no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from routing.lookahead import LookAhead
from routing.predictor_file.reader import PredictorFile
from routing.shards import Document
from routing.topology import Stack
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.simulation.baselines import used_by
from runtime.simulation.calibration import Calibration, Joint
from runtime.simulation.comparison import Contender, file_forecasts, recall
from runtime.simulation.trace_steps import TraceStep

JOINT_TOKENS = 4096
"""Tokens on which a predictor and a look-ahead are fitted together."""


class Sample(NamedTuple):
    """Documents with their decode steps of one token each."""

    documents: Sequence[Document]
    steps: Sequence[Sequence[TraceStep]]

    def ahead(self, name: str) -> LookAhead:
        """The look-ahead of the source `name`, over all tokens."""
        return LookAhead.joined([document.lookahead[name] for document in self.documents])

    def used(self, num_experts: int) -> np.ndarray:
        """The experts used by each token, bool [T, L, E]."""
        return np.concatenate([used_by(steps, num_experts) for steps in self.steps])

    def beginning(self, num_tokens: int) -> Sample:
        """The first documents, up to about `num_tokens` tokens."""
        ends = np.cumsum([len(steps) for steps in self.steps])
        count = int(np.searchsorted(ends, num_tokens)) + 1
        return Sample(self.documents[:count], self.steps[:count])


def unpredicted(stack: Stack, num_steps: int) -> Contender:
    """Predicted reuse without a forecast, from what the cache has seen."""
    return Contender(
        name="uses seen",
        policy=partial(PredictedReuse, stack.num_layers, stack.num_experts, horizon=1),
        forecasts=[None] * num_steps,
    )


def ahead_contenders(
    names: Sequence[str],
    stack: Stack,
    sample: Sample,
    fit: Sample,
    predicting: Mapping[str, tuple[PredictorFile, Contender]],
) -> Iterator[Contender]:
    """For each source: looking 1, 2 ... layers ahead; then the first predictor corrected by it.

    names: the sources, which both samples hold. fit: the documents to calibrate on. predicting:
    files and contenders by name.
    """
    used_TLE = sample.used(stack.num_experts)
    first = next(iter(predicting.items()), None)
    for name in names:
        calibration = Calibration(fit.ahead(name), fit.used(stack.num_experts), stack.top_k)
        ahead_TLDE = calibration.probabilities(sample.ahead(name))
        for depth in range(1, ahead_TLDE.shape[2] + 1):
            yield replace(
                unpredicted(stack, len(used_TLE)),
                name=f"{name}, {depth} ahead",
                ahead_TLDE=ahead_TLDE[:, :, :depth],
                recall_ahead=recall_by_distance(ahead_TLDE[:, :, :depth], used_TLE),
            )
        if first is not None:
            file, alone = first[1]
            joint = _joint(file, calibration, fit.beginning(JOINT_TOKENS), name)
            both_TLDE = joint.probabilities(ahead_TLDE, this_of(alone))
            yield replace(
                alone,
                name=f"{first[0]} + {name}",
                ahead_TLDE=both_TLDE,
                recall_ahead=recall_by_distance(both_TLDE, used_TLE),
            )


def _joint(file: PredictorFile, calibration: Calibration, fit: Sample, name: str) -> Joint:
    """The regression on a predictor and a calibrated look-ahead."""
    forecasts = list(file_forecasts(file, fit.steps))
    this_TLE = np.stack([forecast.this_LE for forecast in forecasts])
    ahead_TLDE = calibration.probabilities(fit.ahead(name))
    return Joint(ahead_TLDE, this_TLE, fit.used(this_TLE.shape[-1]))


def this_of(contender: Contender) -> np.ndarray:
    """A contender's forecast of each token's own experts, float32 [T, L, E]."""
    return np.stack([forecast.this_LE for forecast in contender.forecasts if forecast is not None])


def recall_by_distance(ahead_TLDE: np.ndarray, used_TLE: np.ndarray) -> tuple[float, ...]:
    """`recall` at each distance, over the layers that have a layer so far before them."""
    return tuple(
        recall(ahead_TLDE[:, :-distance, distance - 1], used_TLE[:, distance:])
        for distance in range(1, min(ahead_TLDE.shape[2], used_TLE.shape[1] - 1) + 1)
    )


def with_recall_ahead(contender: Contender, used_TLE: np.ndarray, depth: int) -> Contender:
    """A predictor of whole tokens, scored on the same layers as the look-aheads."""
    this_TLE = this_of(contender)
    distances = range(1, min(depth, used_TLE.shape[1] - 1) + 1)
    recalls = tuple(recall(this_TLE[:, d:], used_TLE[:, d:]) for d in distances)
    return replace(contender, recall_ahead=recalls)
