"""Losses of the upcycling: next token, divergence from the dense model, balance, specialisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from exports.routing_metrics import balance_loss
from exports.smol.layer import UpcycledBlock

CHUNK = 4096
"""Tokens whose logits over the vocabulary exist at once."""


def token_losses(
    student_NH: Tensor, teacher_NH: Tensor, head_VH: Tensor, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence from the teacher of every token, float32 [N] each, in nats.

    Args:
        student_NH: Last hidden states of the model in training.
        teacher_NH: Those of the dense model; no gradient.
        head_VH: Output embedding, the same for both.
        targets_N: int64, the next tokens.
    """
    parts = zip(
        student_NH.split(CHUNK), teacher_NH.split(CHUNK), targets_N.split(CHUNK), strict=True
    )
    losses = [
        checkpoint(_chunk_losses, student, teacher, head_VH, targets, use_reentrant=False)
        for student, teacher, targets in parts
    ]
    entropies, divergences = zip(*losses, strict=True)
    return torch.cat(entropies), torch.cat(divergences)


def _chunk_losses(
    student_NH: Tensor, teacher_NH: Tensor, head_VH: Tensor, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    student_NV = F.linear(student_NH, head_VH).float().log_softmax(-1)
    with torch.no_grad():
        teacher_NV = F.linear(teacher_NH, head_VH).float().log_softmax(-1)
    entropy_N = F.nll_loss(student_NV, targets_N, reduction="none")
    return entropy_N, (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)


def mean_balance(blocks: Sequence[UpcycledBlock]) -> Tensor:
    """Load-balancing loss, mean over the layers: 1 when even."""
    losses = [balance_loss(block.logits_TE, block.experts_TK) for block in blocks]
    return torch.stack(losses).mean()


def mean_information(blocks: Sequence[UpcycledBlock], domains_B: Tensor) -> Tensor:
    """Mutual information of domain and expert in nats, mean over the layers, of B windows.

    0: every domain uses the experts alike; ln E: each has one of its own.
    """
    return torch.stack([information(block.logits_TE, domains_B) for block in blocks]).mean()


def information(logits_TE: Tensor, domains_B: Tensor) -> Tensor:
    """Mutual information of domain and expert in one layer, with every domain weighing the same."""
    probability_BE = logits_TE.float().softmax(-1).unflatten(0, (len(domains_B), -1)).mean(1)
    found, index_B = domains_B.unique(return_inverse=True)
    sums_DE = probability_BE.new_zeros(len(found), probability_BE.shape[1])
    counts_D = torch.bincount(index_B, minlength=len(found))
    own_DE = sums_DE.index_add(0, index_B, probability_BE) / counts_D[:, None]
    mean_E = own_DE.mean(0)
    return (own_DE * (own_DE.log() - mean_E.log())).sum(-1).mean()
