"""Contenders that learn, while a step runs, which experts its coming layers will use.

They read the look-aheads that a trace holds ("gate": `trace.collect --lookahead`; "mlp":
`predictor.layer_ahead`). Nothing is known of a step before its first layer, nor of any later token.
So they evict by the formula of all predictors with what the cache has seen in place of the heads
(predicted reuse without a forecast: uses fading as LFU's do), and protect the experts predicted for
the next 1 to D layers from the moment the router input of this one exists. They prefetch those
only. Running the gates or networks takes no time in this model.
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
"""Tokens that the weights of a predictor and a look-ahead together are fitted on."""


class Sample(NamedTuple):
    """Documents with their decode steps of one token each."""

    documents: Sequence[Document]
    steps: Sequence[Sequence[TraceStep]]

    def ahead(self, name: str) -> LookAhead:
        """What the source `name` says of all tokens."""
        return LookAhead.joined([document.lookahead[name] for document in self.documents])

    def used(self, num_experts: int) -> np.ndarray:
        """Bool [T, L, E]."""
        return np.concatenate([used_by(steps, num_experts) for steps in self.steps])

    def beginning(self, num_tokens: int) -> Sample:
        """The first documents, up to about `num_tokens` tokens."""
        ends = np.cumsum([len(steps) for steps in self.steps])
        count = int(np.searchsorted(ends, num_tokens)) + 1
        return Sample(self.documents[:count], self.steps[:count])


def unpredicted(stack: Stack, num_steps: int) -> Contender:
    """The formula of all predictors, with nothing but what the cache has seen."""
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
    """For each source: looking 1, 2 ... layers ahead; then the first predictor corrected by it."""
    used_TLE = sample.used(stack.num_experts)
    first = next(iter(predicting.items()), None)
    for name in names:
        calibration = Calibration(fit.ahead(name), fit.used(stack.num_experts), stack.top_k)
        said_TLDE = calibration.probabilities(sample.ahead(name))
        for depth in range(1, said_TLDE.shape[2] + 1):
            yield replace(
                unpredicted(stack, len(used_TLE)),
                name=f"{name}, {depth} ahead",
                ahead_TLDE=said_TLDE[:, :, :depth],
                recall_ahead=recall_by_distance(said_TLDE[:, :, :depth], used_TLE),
            )
        if first is not None:
            file, alone = first[1]
            joint = _joint(file, calibration, fit.beginning(JOINT_TOKENS), name)
            both_TLDE = joint.probabilities(said_TLDE, this_of(alone))
            yield replace(
                alone,
                name=f"{first[0]} + {name}",
                ahead_TLDE=both_TLDE,
                recall_ahead=recall_by_distance(both_TLDE, used_TLE),
            )


def _joint(file: PredictorFile, calibration: Calibration, fit: Sample, name: str) -> Joint:
    forecasts = list(file_forecasts(file, fit.steps))
    this_TLE = np.stack([forecast.this_LE for forecast in forecasts])
    said_TLDE = calibration.probabilities(fit.ahead(name))
    return Joint(said_TLDE, this_TLE, fit.used(this_TLE.shape[-1]))


def this_of(contender: Contender) -> np.ndarray:
    """What a predictor says of each token itself, float32 [T, L, E]."""
    return np.stack([forecast.this_LE for forecast in contender.forecasts if forecast is not None])


def recall_by_distance(said_TLDE: np.ndarray, used_TLE: np.ndarray) -> tuple[float, ...]:
    """Recall of as many experts as are used, of the layers that have one so far before them."""
    return tuple(
        recall(said_TLDE[:, :-distance, distance - 1], used_TLE[:, distance:])
        for distance in range(1, min(said_TLDE.shape[2], used_TLE.shape[1] - 1) + 1)
    )


def with_recall_ahead(contender: Contender, used_TLE: np.ndarray, depth: int) -> Contender:
    """A predictor of whole tokens, scored on the same layers as those that look ahead."""
    this_TLE = this_of(contender)
    distances = range(1, min(depth, used_TLE.shape[1] - 1) + 1)
    recalls = tuple(recall(this_TLE[:, d:], used_TLE[:, d:]) for d in distances)
    return replace(contender, recall_ahead=recalls)
