"""Scoring of predictors: the contenders, the held-out documents and the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torchmetrics import MetricCollection
from tqdm.auto import tqdm

from predictor.evaluation.baselines import Baseline, fit_baselines
from predictor.evaluation.settings import EvaluateSettings
from predictor.file.documents import ExportedPredictor, StatelessPredictor, whole_document
from predictor.networks.targets import targets
from predictor.networks.windows import Predictions, PredictorShape, Windows
from predictor.training.data import split_of
from predictor.training.metrics import route_metrics
from routing.names import told_apart
from routing.predictor_file.format import HEADS
from routing.shards import PROMPT, TraceReader, signed_experts

VAL_FRACTION, TEST_FRACTION = 0.05, 0.05
"""The default splits of `predictor.training.data`."""


class Contender(NamedTuple):
    """One row of the table."""

    name: str
    history: str
    """Whether the routes of earlier tokens are "known", "unknown", or "unused" by the predictor."""
    predict: Callable[[Windows], Predictions]
    """Predicts one document."""


class Score(NamedTuple):
    """The figures of one contender."""

    name: str
    history: str
    is_baseline: bool
    heads: dict[str, dict[str, list[float]]]
    """head -> metric -> figure of each layer, NaN for a layer without a token."""

    @property
    def label(self) -> str:
        """The name in tables and pictures."""
        return f"{self.name}, no history" if self.history == "unknown" else self.name

    def mean(self, head: str, metric: str) -> float:
        """The mean over the layers that have a figure; NaN without one."""
        known = [value for value in self.heads[head][metric] if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan


class Corpus:
    """Some documents of a trace; iterating gives each as a batch of one row."""

    def __init__(self, reader: TraceReader, indices: Sequence[int]) -> None:
        self.reader = reader
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Windows]:
        for index in self.indices:
            document = self.reader.document(index)
            experts_TLK = signed_experts(document.experts_TLK, self.reader.stack.num_experts)
            num_prompt = int((document.phase_T == PROMPT).sum())
            yield whole_document(document.token_ids_T, experts_TLK, num_prompt)


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


def corpora(reader: TraceReader, settings: EvaluateSettings) -> tuple[Corpus, Corpus]:
    """The documents to fit the baselines on, and those to score on. Raises ValueError."""
    if settings.fit_trace is not None:
        fit_reader = TraceReader(settings.fit_trace, settings.stack)
        reader.topology.require_match(
            fit_reader.topology,
            ours=f"the trace {reader.directory}",
            theirs=f"the trace {fit_reader.directory}",
        )
        fit, held_out = range(len(fit_reader)), range(len(reader))
        return (
            some(fit_reader, fit, settings.max_fit_tokens),
            some(reader, held_out, settings.max_tokens),
        )
    splits = [split_of(document, VAL_FRACTION, TEST_FRACTION) for document in reader.documents()]
    train, test = ([i for i, s in enumerate(splits) if s == name] for name in ("train", "test"))
    return some(reader, train, settings.max_fit_tokens), some(reader, test, settings.max_tokens)


def some(reader: TraceReader, indices: Sequence[int], max_tokens: int) -> Corpus:
    """Documents picked at random until they have `max_tokens` tokens. Raises ValueError."""
    if not indices:
        raise ValueError(
            f"the {len(reader)} document(s) of {reader.directory} are too few to fit on some and "
            "score on others; name another trace to fit on with --fit_trace, or trace more"
        )
    order = np.random.default_rng(0).permutation(np.asarray(indices))
    ends = np.cumsum(reader.doc_lengths[order])
    return Corpus(reader, order[: int(np.searchsorted(ends, max_tokens)) + 1].tolist())


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
) -> tuple[list[Score], int]:
    """Score every contender on the same tokens; returns the scores and the number of tokens.

    An encoder-decoder predicts generated tokens only. Where one takes part, no contender is scored
    on a document's prompt, or on the first half of its first window where there is no prompt.
    """
    metrics = [{head: route_metrics(documents.reader.stack) for head in HEADS} for _ in contenders]
    stateless = [predictor for predictor in predictors if isinstance(predictor, StatelessPredictor)]
    num_tokens = 0
    for batch in tqdm(documents, desc="scoring", unit="document", leave=False, disable=None):
        first = max((predictor.first_generated(batch) for predictor in stateless), default=0)
        answers = targets(batch, shape)
        num_tokens += batch.token_ids_BT.shape[1] - first
        for contender, heads in zip(contenders, metrics, strict=True):
            predictions = contender.predict(batch)
            for head, logits_BTLE, answer in zip(HEADS, predictions, answers, strict=True):
                rows = answer.valid_BT[:, first:]
                heads[head].update(logits_BTLE[:, first:][rows], answer.used_BTLE[:, first:][rows])
    return [
        Score(
            contender.name,
            contender.history,
            isinstance(contender.predict, Baseline),
            _figures(heads),
        )
        for contender, heads in zip(contenders, metrics, strict=True)
    ], num_tokens


def _figures(heads: dict[str, MetricCollection]) -> dict[str, dict[str, list[float]]]:
    return {
        head: {name: value_L.tolist() for name, value_L in metrics.compute().items()}
        for head, metrics in heads.items()
    }
