"""Lossless packing of bfloat16 weights for the link: 12 bits instead of 16.

A trained (or a random) weight matrix uses few exponents: 15 neighbouring ones hold all but about
1.6 in 10,000 weights (measured on moe-16x64, moe-8x32 and normal random numbers, whose exponents
have 2.6 bits of entropy). So a weight travels as sign and mantissa, 8 bits, and a 4-bit code of its
exponent. Weights outside the window are patched in from a short list that stays on the device. The
bits that arrive are exactly those of the checkpoint; a quarter of the bytes never crosses the link.
The idea of entropy-coding exponents is DFloat11's (arXiv 2504.11651), which reaches 11 bits with
variable-length codes; a fixed 12 can be decoded by any thread without its neighbours.

    low   [C]       sign (bit 7) and mantissa (bits 0 to 6) of a chunk of C weights
    high  [C / 2]   byte j: the code of weight j (bits 0 to 3) and of weight j + C / 2 (bits 4 to 7)
    code  0         the weight is +0 or -0, or in the patch list
    code  1 to 15   its exponent is the chunk's base + code
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CODES = 15
MOST_PATCHES = 0.004
"""Share of weights outside the window from which packing does not pay."""


PART = 1024
"""Chunks packed at once, to bound the scratch memory."""


class Packed(NamedTuple):
    """Records of whole chunks, packed. D chunks of C weights, P patches."""

    low_DC: Tensor
    """uint8"""
    high_DC: Tensor
    """uint8 [D, C / 2]"""
    base_D: Tensor
    """int32, the exponent below the window"""
    counts_D: Tensor
    """int32, patches"""
    units_P: Tensor
    """int32, positions of the patches within their chunks"""
    bits_P: Tensor
    """int16, the weights there"""


def pack(chunks_DC: Tensor) -> Packed | None:
    """Pack bfloat16 weights given as int16 [D, C]; None where too many of them need a patch.

    Runs where the weights are.
    """
    parts = [_pack(some) for some in chunks_DC.split(PART)]
    packed = Packed(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return packed if len(packed.bits_P) <= MOST_PATCHES * chunks_DC.numel() else None


def _pack(chunks_DC: Tensor) -> Packed:
    bits_DC = chunks_DC.to(torch.int32) & 0xFFFF
    exponents_DC = (bits_DC >> 7) & 0xFF
    base_D = _base(exponents_DC)
    codes_DC = exponents_DC - base_D[:, None]
    outside_DC = (codes_DC < 1) | (codes_DC > CODES)
    codes_DC.masked_fill_(outside_DC, 0)
    patched_DC = outside_DC & ((bits_DC & 0x7FFF) != 0)
    low_DC = ((bits_DC >> 8) & 0x80 | bits_DC & 0x7F).to(torch.uint8)
    half = chunks_DC.shape[1] // 2
    high_DC = (codes_DC[:, :half] | codes_DC[:, half:] << 4).to(torch.uint8)
    chunk, unit = patched_DC.nonzero(as_tuple=True)
    counts_D = patched_DC.sum(1, dtype=torch.int32)
    return Packed(low_DC, high_DC, base_D, counts_D, unit.to(torch.int32), chunks_DC[chunk, unit])


def _base(exponents_DC: Tensor) -> Tensor:
    """One less than the first of the 15 exponents in a row that hold most of a chunk's weights."""
    counts_DX = exponents_DC.new_zeros(len(exponents_DC), 256)
    counts_DX.scatter_add_(1, exponents_DC.to(torch.int64), torch.ones_like(exponents_DC))
    counts_DX[:, 0] = 0  # zeros need no window
    sums_DX = torch.nn.functional.pad(counts_DX.cumsum(1), (1, 0))
    held_DX = sums_DX[:, CODES:] - sums_DX[:, :-CODES]
    return (held_DX.argmax(1) - 1).to(torch.int32)


def unpack(packed: Packed) -> Tensor:
    """The weights again, int16 [D, C]. The kernels do the same (`transfer_kernels.bring`)."""
    high_DC = packed.high_DC.to(torch.int32)
    codes_DC = torch.cat([high_DC & 15, high_DC >> 4], 1)
    low_DC = packed.low_DC.to(torch.int32)
    magnitudes_DC = (packed.base_D[:, None] + codes_DC) << 7 | low_DC & 0x7F
    bits_DC = (low_DC & 0x80) << 8 | torch.where(codes_DC > 0, magnitudes_DC, 0)
    chunks_DC = torch.where(bits_DC > 0x7FFF, bits_DC - 0x10000, bits_DC).to(torch.int16)
    numbers = torch.arange(len(chunks_DC), device=chunks_DC.device)
    chunks_DC[numbers.repeat_interleave(packed.counts_D), packed.units_P.long()] = packed.bits_P
    return chunks_DC
