"""Sliding-window attention with rotary positions, all of it driven by explicit positions.

Symbols: B rows, T new tokens, P cached tokens, S keys, D width, N heads, C channels of a head.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN_SCORE = -1e9
ROTARY_BASE = 10_000.0


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding, [B, 1, T, C / 2]."""

    cos: Tensor
    sin: Tensor


def rotation_of(positions_BT: Tensor, channels: int, dtype: torch.dtype) -> Rotation:
    """Rotary position embedding (arXiv 2104.09864) at explicit positions."""
    steps = torch.arange(0, channels, 2, device=positions_BT.device, dtype=torch.float32)
    angles = positions_BT[:, None, :, None].float() * torch.exp(
        steps * (-math.log(ROTARY_BASE) / channels)
    )
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x_BNTC: Tensor, rotation: Rotation) -> Tensor:
    """Turn the two halves of each head's channels as pairs."""
    first, second = x_BNTC.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def sliding_mask(query_positions_BT: Tensor, key_positions_BS: Tensor, window: int) -> Tensor:
    """Scores to add, [B, 1, T, S]: 0 where the key is visible, HIDDEN_SCORE elsewhere.

    A query sees the keys of the last `window` positions up to its own. Keys at negative positions
    (padding, empty cache slots) are seen by nobody; queries there get an average that nobody reads.
    """
    distance = query_positions_BT[:, None, :, None] - key_positions_BS[:, None, None, :]
    hidden = (distance < 0) | (distance >= window) | (key_positions_BS < 0)[:, None, None, :]
    return hidden.float() * HIDDEN_SCORE


class Past(NamedTuple):
    """One block's cached keys and values, and the mask that hides them from new tokens."""

    keys_BNPC: Tensor
    values_BNPC: Tensor
    mask_B1TP: Tensor


class Attention(nn.Module):
    """Sliding-window causal attention. Masks are added to the scores; they come from positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask_B1TT: Tensor, past: Past | None
    ) -> tuple[Tensor, Tensor]:
        """The block's update [B, T, D], and the new tokens' keys and values [2, B, N, T, C]."""
        qkv_JBNTC = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv_JBNTC.unbind(0)
        queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if past is None:
            mixed = F.scaled_dot_product_attention(queries, keys, values, mask_B1TT)
        else:
            mixed = _attend_with_past(queries, keys, values, mask_B1TT, past)
        return self.out(mixed.transpose(1, 2).flatten(2)), torch.stack((keys, values))


def _attend_with_past(
    queries: Tensor, keys: Tensor, values: Tensor, mask_B1TT: Tensor, past: Past
) -> Tensor:
    """Join the scores, not the keys: the past is never copied."""
    queries = queries * queries.shape[-1] ** -0.5
    num_past = past.keys_BNPC.shape[2]
    old_scores = queries @ past.keys_BNPC.transpose(-1, -2) + past.mask_B1TP
    new_scores = queries @ keys.transpose(-1, -2) + mask_B1TT
    weights = torch.cat((old_scores, new_scores), dim=-1).softmax(-1)
    return weights[..., :num_past] @ past.values_BNPC + weights[..., num_past:] @ values
