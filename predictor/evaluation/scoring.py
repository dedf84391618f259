"""Scoring of predictors: who takes part, on which documents, and what each of them gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torchmetrics import MetricCollection
from tqdm.auto import tqdm

from predictor.evaluation.baselines import Baseline, fit_baselines
from predictor.evaluation.settings import EvaluateSettings
from predictor.file.graph import Graph, StatelessGraph, whole_document
from predictor.networks.interface import Predictions, PredictorShape, Windows, targets
from predictor.training.data import split_of
from predictor.training.metrics import route_metrics
from routing.names import told_apart
from routing.predictor_file.format import HEADS
from routing.shards import PROMPT, TraceReader, signed_experts

VAL_FRACTION, TEST_FRACTION = 0.05, 0.05
"""The defaults of `predictor.training.data`."""


class Contender(NamedTuple):
    """One row of the table."""

    name: str
    history: str
    """Are the routes of earlier tokens "known" or "unknown"; "unused" where it does not matter."""
    predict: Callable[[Windows], Predictions]


class Score(NamedTuple):
    """What one contender scored."""

    name: str
    history: str
    trivial: bool
    heads: dict[str, dict[str, list[float]]]
    """head -> metric -> figure of each layer (NaN: never asked)."""

    @property
    def label(self) -> str:
        return f"{self.name}, no history" if self.history == "unknown" else self.name

    def mean(self, head: str, metric: str) -> float:
        known = [value for value in self.heads[head][metric] if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan


class Corpus:
    """Some documents of a trace, each made into a batch of one row when it is asked for."""

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


def check(graphs: Sequence[Graph], reader: TraceReader, settings: EvaluateSettings) -> None:
    """Raise ValueError unless every predictor is for the trace's model and asks the same."""
    for graph in graphs:
        graph.topology.require_match(
            reader.topology,
            ours=f"the predictor {graph.path}",
            theirs=f"the trace {reader.directory}",
        )
        if graph.stack.name != settings.stack:
            raise ValueError(
                f"{graph.path} predicts the {graph.stack.name} stack: "
                f"add --stack {graph.stack.name}"
            )
        if graph.shape.horizon != graphs[0].shape.horizon:
            raise ValueError(
                f"{graph.path} looks {graph.shape.horizon} tokens ahead and {graphs[0].path} "
                f"{graphs[0].shape.horizon}: their horizons do not compare; evaluate them apart"
            )


def corpora(reader: TraceReader, settings: EvaluateSettings) -> tuple[Corpus, Corpus]:
    """What to fit the trivial predictors on, and what to score on. Raises ValueError."""
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
            "to score on others; name another trace to fit on with --fit_trace, or trace more"
        )
    order = np.random.default_rng(0).permutation(np.asarray(indices))
    ends = np.cumsum(reader.doc_lengths[order])
    return Corpus(reader, order[: int(np.searchsorted(ends, max_tokens)) + 1].tolist())


def all_contenders(
    graphs: Sequence[Graph], fit: Corpus, settings: EvaluateSettings
) -> tuple[list[Contender], PredictorShape]:
    """The rows of the table, and the question that all of them answer."""
    horizon = graphs[0].shape.horizon if graphs else settings.horizon
    shape = PredictorShape.of(fit.reader.topology, settings.stack, window=1, horizon=horizon)
    contenders = [
        Contender(baseline.name, "known" if baseline.needs_history else "unused", baseline)
        for baseline in fit_baselines(fit, shape)
    ]
    names = told_apart([graph.path for graph in graphs], lambda path: path.name)
    for graph, name in zip(graphs, names, strict=True):
        if graph.needs_history:
            contenders.append(Contender(name, "known", graph))
            contenders.append(Contender(name, "unknown", _without_history(graph)))
        else:
            contenders.append(Contender(name, "unused", graph))
    return contenders, shape


def _without_history(graph: Graph) -> Callable[[Windows], Predictions]:
    return lambda batch: graph(batch.without_history())


def score(
    contenders: Sequence[Contender],
    documents: Corpus,
    shape: PredictorShape,
    graphs: Sequence[Graph],
) -> tuple[list[Score], int]:
    """Every contender on the same tokens, and how many these are.

    An encoder-decoder says what generated tokens do: where one takes part, the first half of a
    document's first window, or its prompt, counts for nobody.
    """
    metrics = [{head: route_metrics(documents.reader.stack) for head in HEADS} for _ in contenders]
    stateless = [graph for graph in graphs if isinstance(graph, StatelessGraph)]
    num_tokens = 0
    for batch in tqdm(documents, desc="scoring", unit="document", leave=False, disable=None):
        first = max((graph.first_generated(batch) for graph in stateless), default=0)
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
