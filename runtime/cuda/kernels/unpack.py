"""Unpacking expert blocks: for many tokens, whose products want whole matrices, and for giving
a model back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.packed import base_at, packed_at, patches_in, words


@triton.jit
def based(word, base):
    """A word as the checkpoint has it: the base added where there is a code."""
    some = (((word & 0x07800780) + 0x07800780) >> 11) & 0x00010001
    return word + some * (base << 7)


@triton.jit
def in_turn(even, odd):
    """Words of the weights (0, 2) and (1, 3) as the words (0, 1) and (2, 3), in an int64."""
    first = (even & 0xFFFF) | (odd << 16)
    second = ((even >> 16) & 0xFFFF) | (odd & -65536)
    return (first.to(tl.int64) & 0xFFFFFFFF) | (second.to(tl.int64) << 32)


@triton.jit
def unpack(
    to, slots, picked, UNITS: tl.constexpr, STORED: tl.constexpr, MATRICES: tl.constexpr,
    CHUNK: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Unpack the blocks in slots `picked` (int32) to rows 0, 1, ... of `to`, int16 [*, UNITS].

    Grid (chunks, blocks); chunks behind the matrices are copied.
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    block = slots + tl.load(picked + row).to(tl.int64) * STORED
    into = to + row.to(tl.int64) * UNITS + chunk * CHUNK
    if chunk * CHUNK < MATRICES:
        eight = tl.arange(0, CHUNK // 8)
        base = base_at(block, chunk * CHUNK, MATRICES, CHUNK, PATCHES)
        low, codes = packed_at(block, chunk * (CHUNK // 8) + eight, eight >= 0, MATRICES)
        first = in_turn(based(words(low, codes, 0), base), based(words(low, codes, 1), base))
        second = in_turn(based(words(low, codes, 2), base), based(words(low, codes, 3), base))
        four = tl.reshape(tl.join(first, second), (CHUNK // 4,))
        to_four = into.to(tl.pointer_type(tl.int64), bitcast=True) + tl.arange(0, CHUNK // 4)
        tl.store(to_four, four)
        tl.debug_barrier()  # patches overwrite what other threads just stored
        entry = tl.arange(0, PATCHES)
        patch = tl.load(patches_in(block, MATRICES) + chunk * PATCHES + entry)
        is_patch = (entry > 0) & (patch != 0)
        tl.store(into + (patch >> 16), patch.to(tl.int16), mask=is_patch)
    else:
        behind: tl.constexpr = MATRICES * 3 // 4 + MATRICES // CHUNK * PATCHES * 2
        at = (chunk - MATRICES // CHUNK) * CHUNK + tl.arange(0, CHUNK)
        tl.store(
            into + tl.arange(0, CHUNK),
            tl.load(block + behind + at, mask=at < STORED - behind),
        )
