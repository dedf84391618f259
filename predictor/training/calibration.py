"""Calibration: a scale and a shift of each head's logits, so that probabilities match frequencies.

Platt scaling (Platt 1999) of the binary question "is this expert used?". It is fitted on the
validation split by minimising the cross-entropy, and kept in the predictor, so that its graph emits
calibrated logits.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from predictor.networks.interface import RoutePredictor
from predictor.networks.targets import targets
from predictor.networks.windows import Windows
from routing.predictor_file.format import HEADS
from routing.topology import NO_EXPERT

TOKENS_A_BATCH = 256
"""Tokens that the fit takes from a batch; each is L * E events a head."""


def calibrate(predictor: RoutePredictor, batches: Iterable[Windows]) -> dict[str, list[float]]:
    """Fit the predictor's calibration and set it. Returns {head: [scale, shift]}."""
    device = predictor.scale_J.device
    predictor.set_calibration(torch.ones(len(HEADS)), torch.zeros(len(HEADS)))
    events = _collect(predictor, batches)
    fitted = torch.stack([fit_affine(logits, used) for logits, used in events])
    predictor.set_calibration(fitted[:, 0].to(device), fitted[:, 1].to(device))
    return {head: pair.tolist() for head, pair in zip(HEADS, fitted, strict=True)}


@torch.no_grad()
def _collect(predictor: RoutePredictor, batches: Iterable[Windows]) -> list[tuple[Tensor, Tensor]]:
    """Logits and targets of each head, at tokens drawn from every batch."""
    gathered: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in HEADS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in batches:
            batch = batch.to(predictor.scale_J.device)
            predictions = predictor(_every_other_history(batch))
            answers, counted_BT = targets(batch, predictor.shape), predictor.trained_BT(batch)
            for (logits, used), head_BTLE, answer in zip(
                gathered, predictions, answers, strict=True
            ):
                rows, columns = _draw((answer.valid_BT & counted_BT).cpu())
                logits.append(head_BTLE[rows, columns].float().cpu())
                used.append(answer.used_BTLE[rows, columns].cpu())
    return [(torch.cat(logits), torch.cat(used)) for logits, used in gathered]


def _every_other_history(batch: Windows) -> Windows:
    """The batch with unknown history in every other row: the fit must serve both."""
    routes_BTLK = batch.routes_BTLK.clone()
    routes_BTLK[1::2] = NO_EXPERT
    return batch._replace(routes_BTLK=routes_BTLK)


def _draw(counted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of at most TOKENS_A_BATCH tokens, drawn without replacement."""
    rows, columns = counted_BT.nonzero(as_tuple=True)
    chosen = torch.randperm(len(rows))[:TOKENS_A_BATCH]
    return rows[chosen], columns[chosen]


def fit_affine(logits: Tensor, used: Tensor) -> Tensor:
    """The [scale, shift] that minimise the cross-entropy of scale * logits + shift."""
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
