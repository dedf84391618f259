"""A transformer block of the causal predictor: attention, then an MLP.

Symbols: B rows, T new tokens, D width.
"""

from torch import Tensor, nn

from predictor.networks.attention import Attention, KeysValues, RMSNorm, Rotation


class SquaredReLU(nn.Module):
    """max(x, 0) squared (arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every element."""
        x = x.relu()
        return x * x


class Block(nn.Module):
    """Attention and MLP as residual branches with normalised inputs.

    Both branches start small, by GPT-2's rule for a network of `depth` blocks. hidden: width inside
    the MLP.
    """

    def __init__(
        self, width: int, *, heads: int, kv_heads: int, hidden: int, dropout: float, depth: int
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.mlp_norm = RMSNorm(width)
        mlp_out = nn.Linear(hidden, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden, bias=False), SquaredReLU(), mlp_out)
        self.dropout = nn.Dropout(dropout)
        for branch in (self.attention.out, mlp_out):
            nn.init.normal_(branch.weight, std=(2 * depth * branch.in_features) ** -0.5)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """Hidden states [B, T, D], and the new tokens' keys and values; see `Attention`."""
        update, present = self.attention(self.attention_norm(x_BTD), rotation, mask, past)
        x_BTD = x_BTD + self.dropout(update)
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD))), present
