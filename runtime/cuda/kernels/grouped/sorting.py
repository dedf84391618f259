"""Sorting of pairs by expert on the device: nobody has to know where tokens are routed to launch
their products.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chosen(ids, at_P, num_pairs, expert_E, E: tl.constexpr):
    """Whether each of some pairs is of each expert: int32 [P, E]."""
    ids_P = tl.load(ids + at_P, mask=at_P < num_pairs, other=-1).to(tl.int32)
    is_PE = (ids_P[:, None] == expert_E[None, :]) & (expert_E < E)[None, :]
    return is_PE.to(tl.int32)


@triton.jit
def value_of(values_E, is_TE):
    """Of each row, the value of the one expert that it marks: int32 [T]."""
    return tl.sum(values_E[None, :] * is_TE, axis=1)


@triton.jit(
    do_not_specialize=["num_pairs", "height"], do_not_specialize_on_alignment=["counts", "slots"]
)
def sort_pairs(
    ids, order, tiles, starts, counts, slots, num_pairs, height,
    E: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Sort the pairs of ids [P] by expert, stably, and cut each expert's rows into tiles.

    order: int32 [P], pairs of no expert left out. counts: int32 [E], pairs of each. slots: int32
    [E], of each expert, for its tiles. Groups are GROUP experts each. Every program counts all
    pairs, and so needs none of the others. Grid (blocks of BLOCK_P pairs or tiles).
    """
    here = tl.program_id(0) * BLOCK_P
    expert_E = tl.arange(0, BLOCK_E)
    total_E = tl.zeros([BLOCK_E], tl.int32)
    before_E = tl.zeros([BLOCK_E], tl.int32)
    start = here * 0
    while start < num_pairs:
        at = start + tl.arange(0, COUNTED)
        id = tl.load(ids + at, mask=at < num_pairs, other=-1).to(tl.int32)
        is_one = (id >= 0) & (id < E)
        total_E += tl.histogram(id, BLOCK_E, mask=is_one)
        before_E += tl.histogram(id, BLOCK_E, mask=is_one & (at < here))
        start += COUNTED
    first_E = tl.cumsum(total_E, axis=0) - total_E
    at_P = here + tl.arange(0, BLOCK_P)
    is_PE = chosen(ids, at_P, num_pairs, expert_E, E)
    place_PE = tl.cumsum(is_PE, axis=0) - 1 + (first_E + before_E)[None, :]
    place_P = tl.sum(place_PE * is_PE, axis=1)
    tl.store(order + place_P, at_P, mask=tl.sum(is_PE, axis=1) > 0)

    height_E = (total_E + height - 1) // height
    end_E = tl.cumsum(height_E, axis=0)
    num_tiles = tl.sum(height_E, axis=0)
    owner_P = tl.sum((end_E[None, :] <= at_P[:, None]).to(tl.int32), axis=1)
    is_PE = (owner_P[:, None] == expert_E[None, :]).to(tl.int32)
    first_P = value_of(first_E, is_PE) + (at_P - value_of(end_E - height_E, is_PE)) * height
    rest_P = value_of(first_E + total_E, is_PE) - first_P
    is_tile_P = at_P < num_tiles
    slot_P = tl.load(slots + owner_P, mask=is_tile_P, other=0)
    tl.store(tiles + at_P * 3, first_P, mask=is_tile_P)
    tl.store(tiles + at_P * 3 + 1, tl.minimum(rest_P, height), mask=is_tile_P)
    tl.store(tiles + at_P * 3 + 2, slot_P, mask=is_tile_P)
    if here == 0:
        tl.store(counts + expert_E, total_E, mask=expert_E < E)
        begins = (expert_E % GROUP == 0) & (expert_E < E)
        tl.store(starts + expert_E // GROUP, end_E - height_E, mask=begins)
        tl.store(starts + (E + GROUP - 1) // GROUP, num_tiles)
