"""Figures of a model on held-out text: perplexity and routing, by domain, and chats' divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from exports.routing_metrics import expert_shares, usage_entropy
from exports.smol.layer import UpcycledBlock
from exports.smol.text import TokenIds, windows

WINDOWS = 16
"""Windows that are measured at once."""


@torch.inference_mode()
def losses(model: Any, held_out: Mapping[str, TokenIds], context: int) -> dict[str, float]:
    """Mean loss in nats a token, by domain."""
    device = next(model.parameters()).device
    found = {}
    for name, ids_N in held_out.items():
        parts = []
        for part_BT in _windows(ids_N, context, device):
            logits_BTV = model(input_ids=part_BT[:, :-1], use_cache=False).logits
            targets = part_BT[:, 1:].flatten()
            parts.append(
                F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets, reduction="none")
            )
        found[name] = torch.cat(parts).mean().item()
    return found


@torch.inference_mode()
def routing(
    model: Any, blocks: Sequence[UpcycledBlock], held_out: Mapping[str, TokenIds], context: int
) -> dict[str, Any]:
    """Use of the experts on held-out text, every domain weighing the same.

    `least_used`: the smallest share of any expert, over an even share. `entropy`: of a layer's
    usage over its maximum, mean over the layers, for all text and by domain. `shares`: of every
    expert of every layer, by domain.
    """
    device = next(model.parameters()).device
    shares = {}
    for name, ids_N in held_out.items():
        sums = []
        for part_BT in _windows(ids_N, context, device):
            model.model(input_ids=part_BT[:, :-1], use_cache=False)
            experts = blocks[0].experts.num_experts
            sums.append(torch.stack([expert_shares(b.experts_TK, experts) for b in blocks]).cpu())
        shares[name] = torch.stack(sums).mean(0)
    return usage(shares)


def usage(shares: Mapping[str, Tensor]) -> dict[str, Any]:
    """The figures of `routing` from the shares [L, E] of each domain."""
    mean_LE = torch.stack(list(shares.values())).mean(0)
    entropy = {name: usage_entropy(own_LE).mean().item() for name, own_LE in shares.items()}
    return {
        "least_used": mean_LE.min().item() * mean_LE.shape[1],
        "most_used": mean_LE.max().item() * mean_LE.shape[1],
        "entropy": usage_entropy(mean_LE).mean().item(),
        "entropy_by_domain": entropy,
        "shares": {name: _rounded(own_LE) for name, own_LE in shares.items()},
    }


def compared(dense: Mapping[str, float], mixture: Mapping[str, float]) -> dict[str, Any]:
    """Perplexities by domain, of the dense model and the mixture, from their losses."""
    rows = {
        name: {"dense": math.exp(dense[name]), "mixture": math.exp(mixture[name])} for name in dense
    }
    better = [name for name, row in rows.items() if row["mixture"] < row["dense"]]
    return {"perplexity": rows, "better": better}


def _windows(ids_N: TokenIds, context: int, device: torch.device) -> list[Tensor]:
    cut_WT = windows(np.asarray(ids_N), min(context, len(ids_N) - 1))
    return list(torch.from_numpy(cut_WT).to(device).split(WINDOWS))


def _rounded(values_LE: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values_LE.tolist()]
