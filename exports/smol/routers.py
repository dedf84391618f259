"""First weights of the routers: directions in which the domains differ, at every layer.

With experts that are all the same, a router has nothing to learn from. So it starts from the text:
linear discriminants of the domains in the dense model's hidden states (Fisher 1936), mixed at
random over the experts. Its logits have mean 0 over all text, so no expert begins ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exports.smol.layer import UpcycledBlock

RIDGE = 1e-2
"""Added to the covariance, as a share of its mean variance."""
SPREAD = 1.5
"""Standard deviation of a logit over all tokens at first."""


@torch.no_grad()
def start_routers(
    model: Any, blocks: Sequence[UpcycledBlock], windows_BT: Tensor, domains_B: Tensor, seed: int
) -> None:
    """Set the routers of `blocks` from the hidden states of some text.

    Args:
        model: The model that the blocks are in.
        blocks: Its upcycled blocks.
        windows_BT: int64 [B, T], windows of text.
        domains_B: int64 [B], the domain of each.
        seed: Of the mixing over the experts.
    """
    states: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: states.append(args[0].float().cpu()))
        for block in blocks
    ]
    for part_BT in windows_BT.split(8):
        model.model(input_ids=part_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(seed)
    for index, block in enumerate(blocks):
        states_BTH = torch.cat(states[index :: len(blocks)])
        weight_EH = discriminants(states_BTH, domains_B.cpu(), len(block.router), generator)
        block.router.copy_(weight_EH)


def discriminants(
    states_BTH: Tensor, domains_B: Tensor, num_experts: int, generator: torch.Generator
) -> Tensor:
    """Router weights [E, H] for hidden states [B, T, H], float32, of B windows of some domains."""
    x_NH = states_BTH.flatten(0, 1).double()
    mean_H = x_NH.mean(0)
    domain_N = domains_B.repeat_interleave(states_BTH.shape[1])
    own_DH = torch.stack([x_NH[domain_N == domain].mean(0) for domain in domain_N.unique()])
    within_NH = x_NH.clone()
    for domain, own_H in zip(domain_N.unique(), own_DH, strict=True):
        within_NH[domain_N == domain] -= own_H
    covariance = within_NH.T @ within_NH / len(x_NH)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors * values.rsqrt() @ vectors.T
    _, _, directions = torch.linalg.svd((own_DH - mean_H) @ whiten, full_matrices=False)
    kept = min(num_experts, len(own_DH) - 1) if len(own_DH) > 1 else 1
    random = torch.randn(num_experts, num_experts, generator=generator, dtype=torch.float64)
    mixing = torch.linalg.qr(random).Q[:, :kept]
    weight_EH = mixing @ directions[:kept] @ whiten
    weight_EH = weight_EH - (weight_EH @ mean_H)[:, None] * mean_H / mean_H.square().sum()
    logits_NE = x_NH @ weight_EH.T
    return (weight_EH * SPREAD / logits_NE.std(0)[:, None]).float()
