"""Routes of the original and of converted models on the same text, replayed through caches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from routing.predictor_file.reader import PredictorFile
from routing.shards import Document, TraceReader
from runtime.simulation.comparison import file_forecasts, predicting
from runtime.simulation.replay import simulate
from runtime.simulation.trace_steps import document_steps


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The caches under one model's own routes."""

    name: str
    """The arm."""
    tokens: int
    in_common: float
    """Share of the original's experts that the arm uses for the same token and layer."""
    recall_this: float | None
    """Recall of the predictor for a token's own experts; None without a predictor."""
    recall_next: float | None
    hit_rates: list[dict[str, Any]]
    """`ReplayResult` of each policy and cache size."""


def replay(
    name: str,
    trace: Path,
    original: Path,
    documents: int,
    residency: list[float],
    predictor: PredictorFile | None,
) -> Replay:
    """Replay the first `documents` of a trace, token by token.

    original: the trace of the original model over the same text.
    """
    reader = TraceReader(trace)
    chosen = list(islice(reader.documents(), documents))
    others = list(islice(TraceReader(original).documents(), documents))
    num_experts, shape = (
        reader.stack.num_experts,
        (reader.stack.num_layers, reader.stack.num_experts),
    )
    of_documents = [list(document_steps(d, num_experts, decode_all=True)) for d in chosen]
    steps = [step for document in of_documents for step in document]
    recalls: tuple[float | None, float | None] = (None, None)
    if predictor is not None:
        forecasts = list(file_forecasts(predictor, of_documents))
        predicted = predicting(name, forecasts, of_documents, shape, predictor.horizon)
        recalls = predicted.recall_this, predicted.recall_next
    results = simulate(steps, shape, residency=residency, predictor=predictor)
    return Replay(
        name=name,
        tokens=len(steps),
        in_common=_in_common(chosen, others),
        recall_this=recalls[0],
        recall_next=recalls[1],
        hit_rates=[asdict(result) for result in results],
    )


def _in_common(ours: list[Document], theirs: list[Document]) -> float:
    shares = []
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.token_ids_T, other.token_ids_T), "the text is the same"
        same = one.experts_TLK[..., :, None] == other.experts_TLK[..., None, :]
        shares.append(same.any(-1).mean())
    return float(np.mean(shares))
