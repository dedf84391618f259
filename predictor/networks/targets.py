"""Targets: the right answer of each head for every token.

Symbols: B rows, T tokens, L MoE layers, E experts a layer, K experts a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from predictor.networks.windows import PredictorShape, Windows
from routing.topology import NO_EXPERT


class Target(NamedTuple):
    """The right answer of one head, and the tokens at which there is one."""

    used_BTLE: Tensor
    """bool: the expert is used."""
    valid_BT: Tensor
    """bool: the target is known."""


class Targets(NamedTuple):
    """One target for each head, in the order of HEADS."""

    this: Target
    next: Target
    horizon: Target
    far: Target


def multi_hot(experts_BTLK: Tensor, num_experts: int) -> Tensor:
    """Expert ids [..., L, K] as a bool mask [..., L, E]; NO_EXPERT is ignored."""
    slots = experts_BTLK.long().where(experts_BTLK != NO_EXPERT, num_experts)
    mask = experts_BTLK.new_zeros((*slots.shape[:-1], num_experts + 1), dtype=torch.bool)
    return mask.scatter(-1, slots, True)[..., :num_experts]


def following(values_BT: Tensor) -> Tensor:
    """The value of each token's successor; the last column is meaningless."""
    return values_BT.roll(-1, dims=1)


def targets(batch: Windows, shape: PredictorShape) -> Targets:
    """The targets of a batch.

    Only the first head has a target at the last token of a document. Near a document's end the
    horizon is the tokens that are left. Where the row ends before the horizon, there is no horizon
    target, because the document may go on in the next row.
    """
    used_BTLE = multi_hot(batch.experts_BTLK, shape.num_experts)
    continues_BT = batch.continues_BT
    last_BT = _last_of_document(continues_BT)
    ahead = [_used_ahead(used_BTLE, last_BT, count) for count in (shape.horizon, shape.far)]
    return Targets(
        Target(used_BTLE, batch.valid_BT),
        Target(following(used_BTLE), continues_BT),
        *(Target(ahead_BTLE, continues_BT & known_BT) for ahead_BTLE, known_BT in ahead),
    )


def _last_of_document(continues_BT: Tensor) -> Tensor:
    """For each token, the last column of its document in the row."""
    num_tokens = continues_BT.shape[1]
    columns_T = torch.arange(num_tokens, device=continues_BT.device)
    ends_BT = columns_T.where(~continues_BT, num_tokens)
    return ends_BT.flip(1).cummin(1).values.flip(1)


def _used_ahead(used_BTLE: Tensor, last_BT: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Experts used at t+1 ... t+horizon in the same document; whether the row holds them all."""
    num_tokens = used_BTLE.shape[1]
    columns_T = torch.arange(num_tokens, device=used_BTLE.device)
    uses_BTLE = used_BTLE.cumsum(1, dtype=torch.int32)
    until_BT = torch.minimum(columns_T + horizon, last_BT)
    rows_B1 = torch.arange(len(used_BTLE), device=used_BTLE.device)[:, None]
    ahead_BTLE = uses_BTLE[rows_B1, until_BT] > uses_BTLE
    complete_BT = (columns_T + horizon < num_tokens) | (last_BT < num_tokens - 1)
    return ahead_BTLE, complete_BT
