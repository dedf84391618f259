"""Calibration: one scale and one shift of the logits per head, so that probabilities mean what
they say.

Platt scaling (Platt 1999) of the binary questions "is this expert used", fitted on the validation
split by minimising the cross-entropy; kept inside the predictor, so that its graph emits calibrated
logits.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from predictor.interface import HEADS, RoutePredictor, Windows, targets

MAX_TOKENS = 4096
"""Tokens that are enough to fit six numbers: each brings L * E events a head."""


def calibrate(predictor: RoutePredictor, batches: Iterable[Windows]) -> dict[str, list[float]]:
    """Fit and set the predictor's calibration. Returns {head: [scale, shift]}."""
    device = predictor.scale_J.device
    predictor.set_calibration(torch.ones(len(HEADS)), torch.zeros(len(HEADS)))
    events = _collect(predictor, batches)
    fitted = torch.stack([fit_affine(logits, used) for logits, used in events])
    predictor.set_calibration(fitted[:, 0].to(device), fitted[:, 1].to(device))
    return {head: pair.tolist() for head, pair in zip(HEADS, fitted, strict=True)}


@torch.no_grad()
def _collect(predictor: RoutePredictor, batches: Iterable[Windows]) -> list[tuple[Tensor, Tensor]]:
    """Logits and answers of each head, histories known in every other batch."""
    gathered: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in HEADS]
    num_tokens = 0
    for number, batch in enumerate(batches):
        batch = batch.to(predictor.scale_J.device)
        predictions = predictor(batch.without_history() if number % 2 else batch)
        answers = targets(batch, predictor.shape)
        for (logits, used), head_BTLE, answer in zip(gathered, predictions, answers, strict=True):
            logits.append(head_BTLE[answer.valid_BT].float().cpu())
            used.append(answer.used_BTLE[answer.valid_BT].cpu())
        num_tokens += int(batch.valid_BT.sum())
        if num_tokens >= MAX_TOKENS:
            break
    return [(torch.cat(logits), torch.cat(used)) for logits, used in gathered]


def fit_affine(logits: Tensor, used: Tensor) -> Tensor:
    """The [scale, shift] that minimises the cross-entropy of scale * logits + shift."""
    affine = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([affine], max_iter=30, line_search_fn="strong_wolfe")
    answers = used.float()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits * affine[0] + affine[1], answers)
        loss.backward()
        return loss

    if logits.numel():
        optimizer.step(closure)
    return affine.detach()
