"""Look-ahead networks: from one layer's router input to the experts of the coming layers.

After ProMoE (arXiv 2410.22134, section 4): a two-layer perceptron for each layer, trained offline.
Unlike there, a linear path runs beside each perceptron, and one perceptron serves all distances. At
width 0 the linear path is alone, like the probes of crystal-ball two layers ahead.

L MoE layers, N tokens, H hidden width, W network width, O outputs, D distances, E experts a layer,
K experts a token, M experts named.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from predictor.networks.targets import multi_hot
from routing.lookahead import LookAhead, num_named
from routing.shards import experts_dtype

EPSILON = 1e-6


class LookAheadNetworks(nn.Module):
    """logits(l) = W2(l) silu(W1(l) x) + W(l) x + b(l), where x is the input over its RMS.

    The last layer has a network as well, which is never trained or read.
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
            torch.full((num_layers, 1, outputs), rate).logit()  # the base rate
        )

    def forward(self, hidden_LNH: Tensor) -> Tensor:
        """Logits [L, N, D, E] that the layers 1 to D further on use each expert."""
        scale_LN1 = (hidden_LNH.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        x_LNH = hidden_LNH * scale_LN1
        logits_LNO = torch.baddbmm(self.bias_L1O, x_LNH, self.direct_LHO)
        logits_LNO = logits_LNO + silu(x_LNH @ self.up_LHW) @ self.down_LWO
        return logits_LNO.unflatten(-1, (self.depth, self.num_experts))

    def loss(self, hidden_LNH: Tensor, experts_LNK: Tensor) -> Tensor:
        """Mean binary cross-entropy over all predicted layers that exist, in nats an expert."""
        logits_LNDE = self(hidden_LNH)
        used_LNE = multi_hot(experts_LNK, self.num_experts).float()
        losses = [
            binary_cross_entropy_with_logits(logits_LNDE[:-d, :, d - 1], used_LNE[d:])
            for d in range(1, min(self.depth, len(used_LNE) - 1) + 1)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, hidden_LNH: Tensor) -> LookAhead:
        """The look-ahead for N tokens, in the form that traces hold; its scores are logits."""
        logits_LNDE = self(hidden_LNH)
        top = logits_LNDE.topk(num_named(self.top_k, self.num_experts), dim=-1)
        scores_LNDM = top.values.half()
        for distance in range(1, self.depth + 1):
            scores_LNDM[-distance:, :, distance - 1] = -torch.inf  # beyond the last layer
        return LookAhead(
            top.indices.transpose(0, 1).cpu().numpy().astype(experts_dtype(self.num_experts)),
            scores_LNDM.transpose(0, 1).cpu().numpy(),
        )
