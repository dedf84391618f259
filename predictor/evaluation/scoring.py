"""Scoring of predictors: the contenders, and their scores on held-out documents."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from tqdm.auto import tqdm

from predictor.evaluation.baselines import Baseline, fit_baselines
from predictor.evaluation.corpus import Corpus
from predictor.evaluation.settings import EvaluateSettings
from predictor.file.documents import ExportedPredictor, StatelessPredictor
from predictor.networks.targets import targets
from predictor.networks.windows import Predictions, PredictorShape, Windows
from predictor.training.metrics import route_metrics
from routing.names import told_apart
from routing.predictor_file.format import HEADS
from routing.process.cores import available_cores
from routing.shards import TraceReader

GROUP_TOKENS = 4096
"""Tokens that are counted together, about."""


class Contender(NamedTuple):
    """One row of the table."""

    name: str
    history: str
    """Whether the routes of earlier tokens are "known", "unknown", or "unused" by the predictor."""
    predict: Callable[[Windows], Predictions]
    """Predicts one document."""


Figures = dict[str, dict[str, list[float]]]
"""head -> metric -> figure of each layer, NaN for a layer without a token."""
Counts = dict[str, dict[str, dict[str, Tensor]]]
"""head -> metric -> state -> sums."""
Pairs = dict[str, list[tuple[Tensor, Tensor]]]
"""head -> logits and used experts, both [N, L, E]."""


class Score(NamedTuple):
    """The figures of one contender."""

    name: str
    history: str
    is_baseline: bool
    heads: Figures
    labels: dict[str, Figures]
    """The figures on the documents of each label."""

    @property
    def label(self) -> str:
        """The name in tables and pictures."""
        return f"{self.name}, no history" if self.history == "unknown" else self.name

    def mean(self, head: str, metric: str, label: str | None = None) -> float:
        """The mean over the layers that have a figure; NaN without one."""
        figures = self.heads if label is None else self.labels[label]
        known = [value for value in figures[head][metric] if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan


class Scores(NamedTuple):
    """The figures of all contenders, and the tokens that they were scored on."""

    results: list[Score]
    tokens: dict[str, int]
    """Tokens of each label."""


def check(
    predictors: Sequence[ExportedPredictor], reader: TraceReader, settings: EvaluateSettings
) -> None:
    """Raise ValueError unless all predictors are for the trace's model, stack and one horizon."""
    for predictor in predictors:
        predictor.topology.require_match(
            reader.topology,
            ours=f"the predictor {predictor.path}",
            theirs=f"the trace {reader.directory}",
        )
        if predictor.stack.name != settings.stack:
            raise ValueError(
                f"{predictor.path} predicts the {predictor.stack.name} stack: "
                f"add --stack {predictor.stack.name}"
            )
        if predictor.shape.horizon != predictors[0].shape.horizon:
            raise ValueError(
                f"{predictor.path} looks {predictor.shape.horizon} tokens ahead and "
                f"{predictors[0].path} {predictors[0].shape.horizon}: their figures do not "
                "compare; evaluate them apart"
            )


def all_contenders(
    predictors: Sequence[ExportedPredictor], fit: Corpus, settings: EvaluateSettings
) -> tuple[list[Contender], PredictorShape]:
    """The rows of the table, and the sizes and horizon that all of them share."""
    horizon = predictors[0].shape.horizon if predictors else settings.horizon
    shape = PredictorShape.of(fit.reader.topology, settings.stack, window=1, horizon=horizon)
    contenders = [
        Contender(baseline.name, "known" if baseline.needs_history else "unused", baseline)
        for baseline in fit_baselines(fit, shape)
    ]
    names = told_apart([predictor.path for predictor in predictors], lambda path: path.name)
    for predictor, name in zip(predictors, names, strict=True):
        if predictor.needs_history:
            contenders.append(Contender(name, "known", predictor))
            contenders.append(Contender(name, "unknown", _without_history(predictor)))
        else:
            contenders.append(Contender(name, "unused", predictor))
    return contenders, shape


def _without_history(predictor: ExportedPredictor) -> Callable[[Windows], Predictions]:
    return lambda batch: predictor(batch.without_history())


def score(
    contenders: Sequence[Contender],
    documents: Corpus,
    shape: PredictorShape,
    predictors: Sequence[ExportedPredictor],
) -> Scores:
    """Score every contender on the same tokens, on all the cores that there are.

    An encoder-decoder predicts generated tokens only. Where one takes part, no contender is scored
    on a document's prompt, or on the first half of its first window where there is no prompt. The
    figures do not depend on the number of cores: groups of documents are counted by themselves, and
    added up in their order.
    """
    stateless = [predictor for predictor in predictors if isinstance(predictor, StatelessPredictor)]
    groups = list(documents.by_label(GROUP_TOKENS))
    scorer = _Scorer(contenders, documents, shape, stateless)
    counts: dict[str, list[Counts]] = {}
    tokens: dict[str, int] = {}
    with ThreadPoolExecutor(available_cores(), initializer=_one_thread_each) as pool:
        counted = pool.map(scorer.count, (indices for _, indices in groups))
        for (label, _), (found, num_tokens) in zip(
            tqdm(groups, desc="scoring", leave=False, disable=None), counted, strict=True
        ):
            counts[label] = _sum(counts[label], found) if label in counts else found
            tokens[label] = tokens.get(label, 0) + num_tokens
    whole = reduce(_sum, counts.values())
    by_label = {label: [scorer.figures(count) for count in counts[label]] for label in counts}
    return Scores(
        [
            Score(
                contender.name,
                contender.history,
                isinstance(contender.predict, Baseline),
                scorer.figures(whole[row]),
                {label: figures[row] for label, figures in by_label.items()},
            )
            for row, contender in enumerate(contenders)
        ],
        tokens,
    )


def _one_thread_each() -> None:
    """Threads of the pool share the cores; none of them starts others."""
    torch.set_num_threads(1)


class _Scorer:
    """Counts of all contenders on groups of documents, and the figures that follow from them."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        documents: Corpus,
        shape: PredictorShape,
        stateless: Sequence[StatelessPredictor],
    ) -> None:
        self._contenders, self._documents, self._shape = contenders, documents, shape
        self._stateless = stateless
        self._own = threading.local()

    def _metrics(self) -> MetricCollection:
        """The thread's own collection, empty: to make one takes longer than to use it."""
        if not hasattr(self._own, "metrics"):
            self._own.metrics = route_metrics(self._documents.reader.stack)
        metrics: MetricCollection = self._own.metrics
        metrics.reset()
        return metrics

    def count(self, indices: Sequence[int]) -> tuple[list[Counts], int]:
        """The counts of each contender on some documents, and the number of their tokens."""
        logits: list[Pairs] = [{head: [] for head in HEADS} for _ in self._contenders]
        num_tokens = 0
        for batch in map(self._documents.batch, indices):
            first = max((p.first_generated(batch) for p in self._stateless), default=0)
            answers = targets(batch, self._shape)
            num_tokens += batch.token_ids_BT.shape[1] - first
            for contender, pairs in zip(self._contenders, logits, strict=True):
                predictions = contender.predict(batch)
                for head, logits_BTLE, answer in zip(HEADS, predictions, answers, strict=True):
                    rows = answer.valid_BT[:, first:]
                    used_NLE = answer.used_BTLE[:, first:][rows]
                    pairs[head].append((logits_BTLE[:, first:][rows], used_NLE))
        return [self._counts(pairs) for pairs in logits], num_tokens

    def _counts(self, pairs: Pairs) -> Counts:
        counts: Counts = {}
        for head, parts in pairs.items():
            metrics = self._metrics()
            metrics.update(*map(torch.cat, zip(*parts, strict=True)))
            counts[head] = {
                name: {state: _copy(value) for state, value in metric.metric_state.items()}
                for name, metric in metrics.items()
            }
        return counts

    def figures(self, counts: Counts) -> Figures:
        """Head -> metric -> figure of each layer."""
        found: Figures = {}
        for head, states in counts.items():
            metrics = self._metrics()
            for name, metric in metrics.items():
                metric.merge_state(states[name])
            with warnings.catch_warnings():  # that these were not updated here, but merged
                warnings.simplefilter("ignore", UserWarning)
                values = metrics.compute()
            found[head] = {name: value_L.tolist() for name, value_L in values.items()}
        return found


def _copy(state: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(state, Tensor), "states are sums"
    return state.clone()


def _sum(ours: list[Counts], theirs: list[Counts]) -> list[Counts]:
    """The sums of all states, contender by contender."""
    return [
        {
            head: {
                name: {state: value + other[head][name][state] for state, value in states.items()}
                for name, states in metrics.items()
            }
            for head, metrics in one.items()
        }
        for one, other in zip(ours, theirs, strict=True)
    ]
