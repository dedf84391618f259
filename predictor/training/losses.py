"""The loss of route predictors, and the history that training hides.

Symbols: B rows, T tokens, L MoE layers, E experts a layer, K experts a token, J heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from predictor.networks.targets import targets
from predictor.networks.windows import PredictorShape, Windows
from routing.topology import NO_EXPERT

HEAD_WEIGHTS = (4.0, 1.0, 0.3, 0.1)
"""Weights of the heads in the loss. The horizons' loss is mostly unpredictable, and would drown the
others."""


def head_losses(
    heads: Sequence[Tensor], batch: Windows, shape: PredictorShape, counted_BT: Tensor
) -> Tensor:
    """Binary cross-entropy [J] of each head, in the order of HEADS (the paper's eq. 1).

    Summed over experts, averaged over the counted tokens that have a target, and divided by L * K,
    so that models of different sizes compare. `heads` may lack the last ones.
    """
    losses = []
    for logits_BTLE, target in zip(heads, targets(batch, shape), strict=False):
        rows_BT = target.valid_BT & counted_BT
        cross_entropy_BTLE = F.binary_cross_entropy_with_logits(
            logits_BTLE, target.used_BTLE.to(logits_BTLE.dtype), reduction="none"
        )
        total = (cross_entropy_BTLE.sum((2, 3)) * rows_BT).sum()
        losses.append(total / (rows_BT.sum().clamp(min=1) * shape.num_layers * shape.top_k))
    return torch.stack(losses)


def total_loss(losses_J: Tensor) -> Tensor:
    """The weighted sum that is minimised, and that chooses the best checkpoint."""
    weighted = (weight * loss for weight, loss in zip(HEAD_WEIGHTS, losses_J, strict=False))
    return torch.stack(tuple(weighted)).sum()


def hide_routes(routes_BTLK: Tensor, chance: float) -> Tensor:
    """Hide routes in a share `chance` of the rows: all, those up to a token, or single ones."""
    batch, tokens = routes_BTLK.shape[:2]
    device = routes_BTLK.device
    mode_B1 = torch.rand(batch, 1, device=device) / max(chance, 1e-9)
    columns_T = torch.arange(tokens, device=device)
    everywhere_B1 = mode_B1 < 1 / 3
    first_BT = (mode_B1 < 2 / 3) & (columns_T < torch.randint(tokens, (batch, 1), device=device))
    some_BT = (mode_B1 >= 2 / 3) & (mode_B1 < 1) & (torch.rand(batch, tokens, device=device) < 0.5)
    hidden_BT = everywhere_B1 | first_BT | some_BT
    return routes_BTLK.masked_fill(hidden_BT[:, :, None, None], NO_EXPERT)
