"""Upcycled layer: a dense block as experts that differ from it by matrices of low rank.

Expert e's matrix is W + out_e in_e, of the dense W and a pair of narrow matrices. The products with
W are computed once for all experts, and the narrow ones of all experts at once, side by side:

    in   [E x R, width in]    the rows of expert e from e x R on
    out  [width out, E x R]   its columns likewise

A mask keeps, of the E x R products between the two, those of the experts that a token uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exports.smol.settings import Experts

MATRICES = ("gate", "up", "down")


class UpcycledBlock(nn.Module):
    """A Llama block as a mixture of experts. The dense weights take no gradient.

    `logits_TE` and `experts_TK` are the latest forward's, with their autograd graph.
    """

    def __init__(self, dense: Any, experts: Experts, generator: torch.Generator) -> None:
        super().__init__()
        self.experts = experts
        self.dense = dense.requires_grad_(False)
        device, hidden = dense.gate_proj.weight.device, dense.gate_proj.weight.shape[1]
        self.router = nn.Parameter(torch.zeros(experts.num_experts, hidden, device=device))
        pairs = {}
        for name in MATRICES:
            wide, width = getattr(dense, f"{name}_proj").weight.shape
            narrow = experts.num_experts * experts.rank
            inner = torch.randn(narrow, width, generator=generator) / width**0.5
            pairs[f"{name}_in"] = nn.Parameter(inner.to(device))
            pairs[f"{name}_out"] = nn.Parameter(torch.zeros(wide, narrow, device=device))
        self.pairs = nn.ParameterDict(pairs)
        self.logits_TE = torch.empty(0)
        self.experts_TK = torch.empty(0, dtype=torch.int64)

    def forward(self, hidden: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, [..., H] as `hidden`."""
        dense: Any = self.dense
        x_TH = hidden.flatten(0, -2)
        weights_TK, masks = self._route(x_TH)
        pairs = {name: matrix.to(x_TH.dtype) for name, matrix in self.pairs.items()}
        gate_TI, up_TI = dense.gate_proj(x_TH), dense.up_proj(x_TH)
        gate_TN, up_TN = (F.linear(x_TH, pairs[f"{name}_in"]) for name in ("gate", "up"))
        inner_TI, down_TN = torch.zeros_like(gate_TI), torch.zeros_like(gate_TN)
        for weight_T1, mask_TN in zip(weights_TK.split(1, -1), masks, strict=True):
            gate = gate_TI + F.linear(gate_TN * mask_TN, pairs["gate_out"])
            up = up_TI + F.linear(up_TN * mask_TN, pairs["up_out"])
            one_TI = F.silu(gate) * up * weight_T1
            inner_TI = inner_TI + one_TI
            down_TN = down_TN + F.linear(one_TI, pairs["down_in"]) * mask_TN
        out_TH = dense.down_proj(inner_TI) + F.linear(down_TN, pairs["down_out"])
        return out_TH.view_as(hidden)

    def _route(self, x_TH: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Weights of the chosen experts, [T, K], and a mask of the products for each."""
        shape = self.experts
        self.logits_TE = F.linear(x_TH, self.router.to(x_TH.dtype))
        chosen = self.logits_TE.float().softmax(-1).topk(shape.top_k, -1)
        self.experts_TK = chosen.indices
        weights_TK = chosen.values / chosen.values.sum(-1, keepdim=True)
        ids_N = torch.arange(shape.num_experts, device=x_TH.device).repeat_interleave(shape.rank)
        masks = [(ids_T1 == ids_N).to(x_TH.dtype) for ids_T1 in self.experts_TK.split(1, -1)]
        return weights_TK.to(x_TH.dtype), masks


def upcycle(model: Any, experts: Experts, seed: int = 0) -> list[UpcycledBlock]:
    """Replace the blocks of a Llama model by upcycled ones, which compute the same at first.

    Everything else is frozen. The routers are zero: see `exports.smol.routers`.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        layer.mlp = UpcycledBlock(layer.mlp, experts, generator)
    return blocks_of(model)


def blocks_of(model: Any) -> list[UpcycledBlock]:
    """The upcycled blocks of a model, in order."""
    return [layer.mlp for layer in model.model.layers]
