"""Recalibration of an adapted predictor, on documents that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from predictor.adaptation.graph import GraphPredictor
from predictor.networks.targets import targets
from predictor.networks.windows import PredictorShape
from predictor.training.calibration import fit_affine
from predictor.training.rows import Documents, Rows
from routing.predictor_file.format import HEADS
from routing.topology import NO_EXPERT

ROW_TOKENS, ROWS = 256, 4
EVERY = 4
"""One token in so many is looked at: neighbours say much the same."""
FEWEST_TOKENS = 500
"""Fewer tokens than these say nothing about calibration."""


@torch.no_grad()
def recalibrate(graph: GraphPredictor, parts: Sequence[Documents], shape: PredictorShape) -> None:
    """Fit the scale and shift of each head anew, half of the rows without history.

    A graph without them, or too few tokens, are left as they are.
    """
    calibration = graph.calibration()
    tokens = sum(int(documents.lengths.sum()) for documents in parts)
    if calibration is None or tokens < FEWEST_TOKENS:
        return
    scale_J, shift_J = calibration
    for head, (logits, used) in enumerate(_answers(graph, parts, shape)):
        with torch.enable_grad():
            scale, shift = fit_affine(logits, used).tolist()
        scale_J[head] *= scale
        shift_J[head] = shift_J[head] * scale + shift


def _answers(
    graph: GraphPredictor, parts: Sequence[Documents], shape: PredictorShape
) -> list[tuple[Tensor, Tensor]]:
    """Logits and targets of each head, [N, L, E]."""
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in graph.outputs]
    for batch in (batch for part in parts for batch in _rows(part, shape)):
        routes_BTLK = batch.routes_BTLK.clone()
        routes_BTLK[1::2] = NO_EXPERT
        heads = graph(batch._replace(routes_BTLK=routes_BTLK))
        for (logits, used), head, target in zip(found, heads, targets(batch, shape), strict=False):
            logits.append(head[target.valid_BT][::EVERY])
            used.append(target.used_BTLE[target.valid_BT][::EVERY])
    return [(torch.cat(logits), torch.cat(used)) for logits, used in found]


def _rows(documents: Documents, shape: PredictorShape) -> Rows:
    return Rows(documents, shape, row_tokens=ROW_TOKENS, batch_size=ROWS, shuffle=False, seed=0)


def calibration_json(graph: GraphPredictor) -> dict[str, list[float]]:
    """The entry of the metadata: {head: [scale, shift]}."""
    calibration = graph.calibration()
    if calibration is None:
        return {}
    pairs = torch.stack([part.detach().flatten() for part in calibration], 1).tolist()
    return dict(zip(HEADS, pairs, strict=False))
