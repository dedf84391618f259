"""Lossless packing of bfloat16 weights: 12 bits instead of 16, over the link and in the slots.

A trained (or a random) weight matrix uses few exponents: 15 neighbouring ones hold all but about
1.6 in 10,000 weights (measured on moe-16x64, moe-8x32 and normal random numbers, whose exponents
have 2.6 bits of entropy). So a weight is kept as sign and mantissa, 8 bits, and a 4-bit code of its
exponent. Weights outside the window are patches, a short list in each chunk of C weights. The bits
that come out are exactly those of the checkpoint. The idea of entropy-coding exponents is
DFloat11's (arXiv 2504.11651), which reaches 11 bits with variable-length codes; a fixed 12 can be
decoded by any thread without its neighbours.

    low      [D * C]      uint8: sign (bit 7) and mantissa (bits 0 to 6) of a weight
    codes    [D * C / 8]  int32: of the weights 0, 1, 4, 5, 2, 3, 6, 7 of eight, from bit 0 up
    patches  [D, P]       int32: position in the chunk << 16 | the weight's bits; 0 for none;
                          the first of a chunk is instead the base of its matrix

    code  0         the weight is +0 or -0, or a patch (whose low byte is 0)
    code  1 to 15   its exponent is base + code

Kernels work with eight weights at a time: a shift and a mask put two codes where the exponents of
two weights belong, so a product with `kernels.packed.words` costs few instructions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CODES = 15
ORDER = (0, 1, 4, 5, 2, 3, 6, 7)
"""Order of the codes of eight weights."""
MOST_BASE = 127
"""Kernels multiply activations by 2^(base - 64): those of 2^64 stay finite."""
PATCHES = (16, 64)
"""Entries for a chunk's patches and its base: of the first that does for every chunk of a model."""
PART = 1024
"""Chunks packed at once, to bound the scratch memory."""
UNPACKED_PART = 32
"""Chunks unpacked at once, to stay in a core's cache."""


def packed_bytes(num_chunks: int, chunk: int, patches: int) -> int:
    """Bytes of so many chunks, packed."""
    return num_chunks * (chunk * 3 // 2 + 4 * patches)


def pack(matrices: list[Tensor], patches: int) -> Tensor | None:
    """Pack matrices, bfloat16 given as int16 [*, C] each: their chunks one after the other, uint8.

    None where a chunk has no room for its patches. Runs where the weights are.
    """
    parts = [part for matrix_DC in matrices for part in _pack(matrix_DC, patches)]
    if any(part is None for part in parts):
        return None
    columns = zip(*(part for part in parts if part is not None), strict=True)
    return torch.cat([some.view(torch.uint8).flatten() for column in columns for some in column])


def _pack(matrix_DC: Tensor, patches: int) -> Iterator[tuple[Tensor, Tensor, Tensor] | None]:
    """(low, codes, patches) of parts of a matrix, or None."""
    base = _base(matrix_DC)
    for chunks_DC in matrix_DC.split(PART):
        bits_DC = chunks_DC.to(torch.int32) & 0xFFFF
        codes_DC = (bits_DC >> 7 & 0xFF) - base
        outside_DC = (codes_DC < 1) | (codes_DC > CODES)
        codes_DC.masked_fill_(outside_DC, 0)
        is_patch_DC = outside_DC & ((bits_DC & 0x7FFF) != 0)
        patches_DP = _patches(bits_DC, is_patch_DC, patches)
        if patches_DP is None:
            yield None
            return
        patches_DP[:, 0] = base
        low_DC = (bits_DC >> 8 & 0x80 | bits_DC & 0x7F).masked_fill_(is_patch_DC, 0)
        yield low_DC.to(torch.uint8), _eight(codes_DC), patches_DP


def _eight(codes_DC: Tensor) -> Tensor:
    """The codes of eight weights in an int32, [D, C / 8]."""
    codes_DC8 = codes_DC.unflatten(-1, (-1, 8))
    eight_DC = codes_DC8[..., ORDER[0]].clone()
    for place, weight in enumerate(ORDER[1:], 1):
        eight_DC |= codes_DC8[..., weight] << 4 * place
    return eight_DC


def _patches(bits_DC: Tensor, is_patch_DC: Tensor, patches: int) -> Tensor | None:
    counts_D = is_patch_DC.sum(1)
    if int(counts_D.max()) >= patches:
        return None
    chunk, unit = is_patch_DC.nonzero(as_tuple=True)
    rank = torch.arange(len(chunk), device=chunk.device) - (counts_D.cumsum(0) - counts_D)[chunk]
    patches_DP = bits_DC.new_zeros(len(bits_DC), patches)
    patches_DP[chunk, rank + 1] = unit.to(torch.int32) << 16 | bits_DC[chunk, unit]
    return patches_DP


def _base(matrix_DC: Tensor) -> Tensor:
    """One less than the first of the 15 exponents in a row that hold most of a matrix's weights."""
    counts_X = torch.zeros(256, dtype=torch.int64, device=matrix_DC.device)
    for chunks_DC in matrix_DC.split(PART):
        exponents = (chunks_DC >> 7 & 0xFF).flatten()
        counts_X += torch.bincount(exponents, minlength=256)
    counts_X[0] = 0  # zeros need no window
    sums_X = torch.nn.functional.pad(counts_X.cumsum(0), (1, 0))
    held_X = sums_X[1 + CODES :] - sums_X[1:-CODES]
    base: Tensor = held_X[: MOST_BASE + 1].argmax().to(torch.int32)
    return base


def unpack(packed: Tensor, chunk: int, patches: int, into_DC: Tensor | None = None) -> Tensor:
    """The weights again, int16 [D, C], on the CPU. The kernel `unpack` does the same.

    into_DC: memory for them. Chunks of one base are unpacked at once, two weights to a look-up.
    """
    num_chunks = len(packed) // packed_bytes(1, chunk, patches)
    sizes = [num_chunks * chunk, num_chunks * chunk // 2, num_chunks * 4 * patches]
    low, pairs, rest = packed.split(sizes)
    low_DC, pairs_DC = low.view(num_chunks, chunk), pairs.view(num_chunks, -1)
    patches_DP = rest.clone().view(torch.int32).view(num_chunks, patches)
    if into_DC is None:
        into_DC = torch.empty(num_chunks, chunk, dtype=torch.int16)
    bases, counts = torch.unique_consecutive(patches_DP[:, 0], return_counts=True)
    at = 0
    for base, count in zip(bases.tolist(), counts.tolist(), strict=True):
        table = _pair_table(base)
        for start in range(at, at + count, UNPACKED_PART):
            rows = slice(start, min(start + UNPACKED_PART, at + count))
            _unpack(low_DC[rows], pairs_DC[rows], table, into_DC[rows])
        at += count
    chunk_of, entry = (patches_DP[:, 1:] != 0).nonzero(as_tuple=True)
    patch = patches_DP[chunk_of, entry + 1]
    into_DC[chunk_of, (patch >> 16).long() % chunk] = _as_int16(patch & 0xFFFF)
    return into_DC


def _unpack(low_DC: Tensor, pairs_DC: Tensor, table: Tensor, into_DC: Tensor) -> None:
    """Put signs and mantissas, and the exponents of two weights at a time, where they belong."""
    torch.bitwise_and(low_DC.view(torch.int8).to(torch.int16), -0x7F81, out=into_DC)
    exponents = table.index_select(0, pairs_DC.reshape(-1).to(torch.int32)).view(-1, 4)
    pairs_N4 = into_DC.view(torch.int32).view(-1, 4)
    for place, pair in enumerate(ORDER[::2]):
        pairs_N4[:, pair // 2] |= exponents[:, place]


def _pair_table(base: int) -> Tensor:
    """The exponents of two weights, int32 [256], by the byte of their codes."""
    byte = torch.arange(256)
    first, second = byte & 15, byte >> 4
    bits = [torch.where(code > 0, base + code, 0) << 7 & 0x7F80 for code in (first, second)]
    return bits[0].to(torch.int32) | bits[1].to(torch.int32) << 16


def _as_int16(bits: Tensor) -> Tensor:
    return torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16)
