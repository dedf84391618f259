"""Scores of a predictor on documents: its loss, and recall and calibration of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from predictor.file.documents import whole_document
from predictor.networks.targets import targets
from predictor.networks.windows import Predictions, PredictorShape, Windows
from predictor.training.losses import head_losses, total_loss
from predictor.training.metrics import route_metrics
from predictor.training.rows import Documents
from routing.predictor_file.format import HEADS
from routing.shards import PROMPT, signed_experts
from routing.topology import Stack


class Score(NamedTuple):
    """The figures of one predictor on some documents, with known history."""

    loss: float
    """The heads' weighted cross-entropy, which training minimises."""
    metrics: dict[str, dict[str, list[float]]]
    """head -> metric -> figure of each layer."""

    def mean(self, head: str, metric: str) -> float:
        """The mean over the layers."""
        return float(np.nanmean(self.metrics[head][metric]))

    def summary(self) -> dict[str, float]:
        """The figures of a report: the loss, and means over the layers."""
        found = {"loss": self.loss}
        for head in HEADS:
            for metric in ("recall", "recall_1_5k", "calibration_error"):
                found[f"{head}_{metric}"] = self.mean(head, metric)
        return found


@torch.no_grad()
def score(
    predict: Callable[[Windows], Predictions],
    documents: Documents,
    shape: PredictorShape,
    stack: Stack,
) -> Score:
    """Score `predict`, which takes a document as a batch of one row."""
    metrics = {head: route_metrics(stack) for head in HEADS}
    losses: list[tuple[int, float]] = []
    for batch in rows_of(documents, shape):
        predictions = predict(batch)
        loss = total_loss(head_losses(predictions, batch, shape, batch.valid_BT))
        losses.append((batch.token_ids_BT.shape[1], float(loss)))
        for head, logits, target in zip(HEADS, predictions, targets(batch, shape), strict=True):
            if target.valid_BT.any():
                metrics[head].update(logits[target.valid_BT], target.used_BTLE[target.valid_BT])
    figures: dict[str, Any] = {
        head: {name: value_L.tolist() for name, value_L in metric.compute().items()}
        for head, metric in metrics.items()
    }
    total = sum(tokens for tokens, _ in losses)
    return Score(sum(tokens * loss for tokens, loss in losses) / total, figures)


def rows_of(documents: Documents, shape: PredictorShape) -> Iterator[Windows]:
    """Each document as a batch of one row."""
    for document in documents:
        experts_TLK = signed_experts(document.experts_TLK, shape.num_experts)
        num_prompt = int((document.phase_T == PROMPT).sum())
        yield whole_document(document.token_ids_T, experts_TLK, num_prompt)
