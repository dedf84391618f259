"""Hit rates of a cache on held-out documents, before and after a predictor was adapted."""

from __future__ import annotations

from pathlib import Path

from predictor.training.rows import Documents
from routing.predictor_file.reader import open_predictor
from routing.shards import Document
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.simulation.replay import ReplayResult, simulate
from runtime.simulation.trace_steps import TraceStep, document_steps

RESIDENCY = 0.125, 0.25, 0.5
"""Shares of the experts that are resident."""
PREDICTED = PredictedReuse.name

HitRates = dict[str, list[float]]
"""Policy -> hit rate for each of RESIDENCY; "before" and "after" evict by predicted reuse."""


def hit_rates(documents: Documents, before: Path, after: Path, *, max_tokens: int) -> HitRates:
    """Hit rates over the first tokens of `documents`, decoded one by one with one cache."""
    found: HitRates = {}
    for result in _replay(documents, before, max_tokens):
        name = "before" if result.policy == PREDICTED else result.policy
        found.setdefault(name, []).append(result.hit_rate)
    adapted = _replay(documents, after, max_tokens)
    found["after"] = [result.hit_rate for result in adapted if result.policy == PREDICTED]
    return found


def _replay(documents: Documents, path: Path, max_tokens: int) -> list[ReplayResult]:
    predictor = open_predictor(path, num_threads=1)
    stack = predictor.stack
    steps: list[TraceStep] = []
    for document in documents:
        left = max_tokens - len(steps)
        if left <= 0:
            break
        steps += document_steps(_cut(document, left), stack.num_experts, decode_all=True)
    shape = stack.num_layers, stack.num_experts
    return simulate(steps, shape, residency=RESIDENCY, predictor=predictor)


def _cut(document: Document, length: int) -> Document:
    return Document(
        document.token_ids_T[:length],
        document.experts_TLK[:length],
        document.phase_T[:length],
        document.label,
    )
