"""Sliding-window attention with rotary embeddings, both driven by explicit positions.

Symbols: B rows, T new tokens, P cached tokens, S keys, D width, M key/value heads, G query heads
that share one of them, N = M * G query heads, R = G * T queries of the same keys, C channels of a
head. The operations are chosen for a decode step in onnxruntime, where each node costs about a
microsecond whatever it computes.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN_SCORE = -1e9
ROTARY_BASE = 10_000.0


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding, [B, 1, T, C] each."""

    cos: Tensor
    sin: Tensor
    """Negated for the first half of the channels."""


def rotation_of(positions_BT: Tensor, channels: int, dtype: torch.dtype) -> Rotation:
    """Rotary position embedding (arXiv 2104.09864) at explicit positions."""
    steps = torch.arange(0, channels, 2, device=positions_BT.device, dtype=torch.float32)
    angles = positions_BT[:, None, :, None].float() * torch.exp(
        steps * (-math.log(ROTARY_BASE) / channels)
    )
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def rotate(x_BNTC: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the two halves of each head's channels as pairs."""
    first, second = x_BNTC.chunk(2, dim=-1)
    return x_BNTC * rotation.cos + torch.cat((second, first), dim=-1) * rotation.sin


def sliding_mask(query_positions_BT: Tensor, key_positions_BS: Tensor, window: int) -> Tensor:
    """Attention mask to add to scores, [B, 1, T, S]: 0 for a visible key, else HIDDEN_SCORE.

    A query sees the keys of the last `window` positions up to its own. No query sees a key at a
    negative position (padding, empty cache entries); a query there gets a meaningless average.
    """
    distance = query_positions_BT[:, None, :, None] - key_positions_BS[:, None, None, :]
    hidden = (distance < 0) | (distance >= window) | (key_positions_BS < 0)[:, None, None, :]
    return hidden.float() * HIDDEN_SCORE


class RMSNorm(nn.Module):
    """x / rms(x), scaled by channel (arXiv 1910.07467), in the form that onnxruntime fuses."""

    EPSILON = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, in float32."""
        exact = x.float()
        root = torch.sqrt(exact.square().mean(-1, keepdim=True) + self.EPSILON)
        return (exact / root).to(x.dtype) * self.weight.to(x.dtype)


class KeysValues(NamedTuple):
    """One block's keys and values, cached or new."""

    keys_BMPC: Tensor
    values_BMPC: Tensor


class Attention(nn.Module):
    """Sliding-window causal attention, with masks made from positions.

    Groups of the `heads` query heads share `kv_heads` keys and values (arXiv 2305.13245), which
    makes the cache, read at every step, smaller. Queries and keys are normalised by head
    (arXiv 2010.04245).
    """

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * (width // heads), bias=False)
        self.norm = RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, mask: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """The block's update [B, T, D], and the new tokens' keys and values.

        The mask covers the past keys, then the new ones: [B, 1, T, S], or with a past
        [B, 1, R, S], where each query of the group repeats it.
        """
        num_heads, num_kv = self.heads, self.kv_heads
        heads_BTNC = self.qkv(x_BTD).unflatten(-1, (num_heads + 2 * num_kv, -1))
        heads_BNTC = heads_BTNC.transpose(1, 2)
        turned, values_BMTC = heads_BNTC.split((num_heads + num_kv, num_kv), dim=1)
        turned = rotate(self.norm(turned), rotation)
        queries, keys_BMTC = turned.split((num_heads, num_kv), dim=1)
        attend = _attend if past is None else partial(_attend_with_past, past=past)
        mixed_BNTC = attend(queries, keys_BMTC, values_BMTC, mask)
        update_BTD = self.out(mixed_BNTC.transpose(1, 2).flatten(2))
        return update_BTD, KeysValues(keys_BMTC, values_BMTC)


def _attend(queries_BNTC: Tensor, keys: Tensor, values: Tensor, mask_B1TT: Tensor) -> Tensor:
    groups = queries_BNTC.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    return F.scaled_dot_product_attention(queries_BNTC, keys, values, mask_B1TT)


def _attend_with_past(
    queries_BNTC: Tensor, keys: Tensor, values: Tensor, mask_B1RS: Tensor, past: KeysValues
) -> Tensor:
    """Attend by joining scores, not keys: the past is never copied."""
    batch, num_kv, num_new, channels = keys.shape
    queries_BMRC = queries_BNTC.reshape(batch, num_kv, -1, channels) * channels**-0.5
    old_scores = queries_BMRC @ past.keys_BMPC.transpose(-1, -2)
    new_scores = queries_BMRC @ keys.transpose(-1, -2)
    weights_BMRS = (torch.cat((old_scores, new_scores), dim=-1) + mask_B1RS).softmax(-1)
    old, new = weights_BMRS.split((past.keys_BMPC.shape[2], num_new), dim=-1)
    return (old @ past.values_BMPC + new @ values).reshape(queries_BNTC.shape)
