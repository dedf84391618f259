"""Metrics of routing: balance between experts, and overlap from token to token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RouterTap:
    """Hooks that keep the router logits and the chosen experts of the latest forward.

    `logits` has one tensor [T, E] a layer, with its autograd graph; `experts` one int64 [T, K].
    """

    def __init__(self, model: nn.Module) -> None:
        self.logits: list[Tensor] = []
        self.experts: list[Tensor] = []
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.mlp.gate.register_forward_hook(self._keep)

    def _keep(self, gate: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _, experts_TK = output
        self.logits.append(logits_TE)
        self.experts.append(experts_TK)

    def clear(self) -> None:
        """Drop the latest forward. Call it before every forward."""
        self.logits, self.experts = [], []


def expert_shares(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Share of all uses that goes to each expert, float32 [E]."""
    ids_E = torch.arange(num_experts, device=experts_TK.device)
    uses_E = (experts_TK[..., None] == ids_E).sum((0, 1), dtype=torch.float32)
    return uses_E / experts_TK.numel()


def balance_loss(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Load-balancing loss of one layer: E x sum over experts of share x mean router probability.

    Switch Transformers (arXiv 2101.03961), equations 4 to 6, over top-k uses: 1 when even.
    """
    num_experts = logits_TE.shape[-1]
    probability_E = logits_TE.float().softmax(-1).mean(0)
    return num_experts * (expert_shares(experts_TK, num_experts) * probability_E).sum()


def usage_entropy(shares_LE: Tensor) -> Tensor:
    """Entropy of each layer's expert usage over its maximum, [L]: 1 when even."""
    num_experts = shares_LE.shape[-1]
    return torch.special.entr(shares_LE).sum(-1) / torch.log(torch.tensor(float(num_experts)))


def previous_token_overlap(experts_BTK: Tensor) -> Tensor:
    """Share of a token's experts that the previous token used too, over B sequences."""
    same_BTKK = experts_BTK[:, 1:, :, None] == experts_BTK[:, :-1, None, :]
    return same_BTKK.any(-1).float().mean()


@torch.inference_mode()
def measure(
    model: nn.Module, tap: RouterTap, windows: dict[str, Tensor], batch: int
) -> dict[str, Any]:
    """Loss and routing metrics over `windows`, int64 [windows, context + 1] for each domain.

    `loss`: nats a token, by domain. `usage_entropy` and `previous_token_overlap`: one figure a
    layer. `least_used`: the smallest share of any expert, over an even share. `top_k_cover`: the
    share of all uses that goes to a layer's K most used experts, over all text and within a domain.
    """
    loss, shares, overlap = {}, {}, []
    for name, windows_NT in windows.items():
        losses, shares_sum = [], torch.zeros(())
        for window_BT in windows_NT.split(batch):
            losses.append(next_token_loss(model, tap, window_BT).cpu())
            experts_LBTK = torch.stack(tap.experts).unflatten(1, (len(window_BT), -1))
            overlap.append(torch.stack([previous_token_overlap(e) for e in experts_LBTK]).cpu())
            shares_LE = [expert_shares(e.flatten(0, 1), _num_experts(tap)) for e in experts_LBTK]
            shares_sum = shares_sum + torch.stack(shares_LE).cpu()
        loss[name] = torch.stack(losses).mean().item()
        shares[name] = shares_sum / len(losses)
    shares_DLE = torch.stack(list(shares.values()))
    top_k = tap.experts[0].shape[-1]
    mean_LE = shares_DLE.mean(0)
    return {
        "loss": loss,
        "mean_loss": sum(loss.values()) / len(loss),
        "usage_entropy": usage_entropy(mean_LE).tolist(),
        "least_used": (mean_LE.min() * mean_LE.shape[-1]).item(),
        "previous_token_overlap": torch.stack(overlap).mean(0).tolist(),
        "top_k_cover": mean_LE.topk(top_k).values.sum(-1).mean().item(),
        "top_k_cover_within_domain": shares_DLE.topk(top_k).values.sum(-1).mean().item(),
    }


def next_token_loss(model: nn.Module, tap: RouterTap, windows_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens after the first of each window, in nats. Fills `tap`."""
    tap.clear()
    logits_BTV = model(input_ids=windows_BT[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), windows_BT[:, 1:].flatten()
    )


def _num_experts(tap: RouterTap) -> int:
    return tap.logits[0].shape[-1]
