"""Small networks that read one layer's router input and say which experts coming layers will use.

After ProMoE (arXiv 2410.22134, section 4): a two-layer perceptron for each layer, trained offline.
Ours has a linear path beside it, and one perceptron serves all distances.

L MoE layers, N tokens, H hidden, W width, D distances, E experts, K experts a token.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from routing.lookahead import LookAhead, num_named
from routing.shards import experts_dtype

EPSILON = 1e-6


class AheadNetworks(nn.Module):
    """logits(l) = W2(l) silu(W1(l) x) + W(l) x + b(l), with x the input over its root mean square.

    The last layer has a network too, which nothing trains or reads.
    """

    def __init__(
        self, num_layers: int, num_experts: int, top_k: int, *, hidden: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.num_experts, self.depth, self.top_k = num_experts, depth, top_k
        outputs = depth * num_experts
        self.up_LHW = nn.Parameter(torch.randn(num_layers, hidden, width) / hidden**0.5)
        self.down_LWO = nn.Parameter(torch.zeros(num_layers, width, outputs))
        self.direct_LHO = nn.Parameter(torch.zeros(num_layers, hidden, outputs))
        rate = top_k / num_experts * 0.98 + 0.01
        self.bias_L1O = nn.Parameter(
            torch.full((num_layers, 1, outputs), rate).logit()  # as if all were used alike
        )

    def forward(self, hidden_LNH: Tensor) -> Tensor:
        """Logits [L, N, D, E] of use by the layers 1 to D further on."""
        scale_LN1 = (hidden_LNH.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        x_LNH = hidden_LNH * scale_LN1
        logits_LNO = torch.baddbmm(self.bias_L1O, x_LNH, self.direct_LHO)
        logits_LNO = logits_LNO + silu(x_LNH @ self.up_LHW) @ self.down_LWO
        return logits_LNO.unflatten(-1, (self.depth, self.num_experts))

    def loss(self, hidden_LNH: Tensor, experts_LNK: Tensor) -> Tensor:
        """Mean binary cross-entropy over the layers that there are, in nats an expert."""
        logits_LNDE = self(hidden_LNH)
        used_LNE = used_experts(experts_LNK, self.num_experts).float()
        losses = [
            binary_cross_entropy_with_logits(logits_LNDE[:-d, :, d - 1], used_LNE[d:])
            for d in range(1, min(self.depth, len(used_LNE) - 1) + 1)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def named(self, hidden_LNH: Tensor) -> LookAhead:
        """What the networks say of N tokens, as traces hold it; scores are logits."""
        logits_LNDE = self(hidden_LNH)
        top = logits_LNDE.topk(num_named(self.top_k, self.num_experts), dim=-1)
        scores_LNDM = top.values.half()
        for distance in range(1, self.depth + 1):
            scores_LNDM[-distance:, :, distance - 1] = -torch.inf  # beyond the last layer
        return LookAhead(
            top.indices.transpose(0, 1).cpu().numpy().astype(experts_dtype(self.num_experts)),
            scores_LNDM.transpose(0, 1).cpu().numpy(),
        )


def used_experts(experts_LNK: Tensor, num_experts: int) -> Tensor:
    """Bool [L, N, E]; NO_EXPERT is none."""
    used = torch.zeros(
        (*experts_LNK.shape[:2], num_experts + 1), dtype=torch.bool, device=experts_LNK.device
    )
    used.scatter_(-1, torch.where(experts_LNK < 0, num_experts, experts_LNK), True)
    return used[..., :num_experts]
