"""The planning kernel: the experts a layer needs, their slots, and the victims of the missing.

One program a layer. It keeps the slot table on the device and does to it what `ExpertCache` does
on the host: touch, then give each missing expert the slot of lowest value that this call does
not need. The values come from one of five rules:

    rule    value of a resident key (layer, expert)
    CLOCK   when it was last used (LRU)
    COUNT   how often it was used, fading (LFU)
    TABLE   before[key] where its layer of this step is still to run, else after[key]
    STAMP   before[key], which becomes after[key] when it is used
    CYCLE   the expected next use (`Reuse`): by before[key] and after[key], means of its uses, and
            values[key], its layer's discount

TABLE is any policy that can be computed ahead: predicted reuse, Belady. STAMP is one whose values
only change with a use: ClassLRU, LFRU.

A wide call is planned in ranges of experts, one launch each: a range that has run gives its slots
to the next (`runtime.cuda.decode.experts.ranges`), as `ExpertCache.ranges` does. What the call
still needs then is evicted last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cache.expert_cache import LAST_VICTIMS
from runtime.cache.rules import reuse
from runtime.cuda.kernels.doorbell import leave_to_cpu
from runtime.cuda.kernels.transfer import FREE, give_up_parts, settle, take_parts

CLOCK, COUNT, TABLE, STAMP, CYCLE = (tl.constexpr(rule) for rule in range(5))
DISCOUNT = tl.constexpr(reuse.DISCOUNT)
RECENT, USUAL = tl.constexpr(reuse.RECENT), tl.constexpr(1 - reuse.RECENT)
RECENT_FADE, USUAL_FADE = (tl.constexpr(fade) for fade in reuse.FADES)
LATER = tl.constexpr(LAST_VICTIMS)
TRUST_DECAY = tl.constexpr(0.98)


@triton.jit
def slot_values(keys_S, values, before, after, layer, E: tl.constexpr, RULE: tl.constexpr):
    """The value of each slot's content; -inf for a free slot."""
    is_free = keys_S == FREE
    safe_S = tl.where(is_free, 0, keys_S)
    if RULE == TABLE:
        ran = safe_S // E <= layer
        worth_S = tl.where(ran, tl.load(after + safe_S), tl.load(before + safe_S))
    elif RULE == STAMP:
        worth_S = tl.load(before + safe_S)
    elif RULE == CYCLE:
        chance_S = RECENT * tl.load(before + safe_S) + USUAL * tl.load(after + safe_S)
        expected_S = chance_S / (1.0 - (1.0 - chance_S) * DISCOUNT)
        turn_S = tl.where(safe_S // E <= layer, DISCOUNT, 1.0)
        worth_S = expected_S * tl.load(values + safe_S) * turn_S
    else:
        worth_S = tl.load(values + safe_S)
    return tl.where(is_free, float("-inf"), worth_S)


@triton.jit
def next_values(experts_E, values, before, after, layer, E: tl.constexpr, RULE: tl.constexpr):
    """What the layer's experts will be worth after this step, as far as the rule knows before."""
    at_E, is_expert = layer * E + experts_E, experts_E < E
    if (RULE == TABLE) | (RULE == STAMP):
        worth_E = tl.load(after + at_E, mask=is_expert, other=0.0)
    elif RULE == CYCLE:
        worth_E = RECENT * tl.load(before + at_E, mask=is_expert, other=0.0)
        worth_E += USUAL * tl.load(after + at_E, mask=is_expert, other=0.0)
    else:
        worth_E = tl.load(values + at_E, mask=is_expert, other=0.0)
    return worth_E


@triton.jit
def touch(
    experts_N, used_N, rank_N, num_used, values, before, after, clock, layer, E: tl.constexpr,
    RULE: tl.constexpr,
):  # fmt: skip
    """Tell the rule which of the experts this layer uses, in the order of their ranks.

    CYCLE wants to know of all experts (`follow_uses`); without evictions, of none.
    """
    if RULE == CLOCK:
        now = tl.load(clock)
        tl.store(values + layer * E + experts_N, now + rank_N, mask=used_N)
        tl.store(clock, now + num_used)
    if RULE == COUNT:
        counts_N = tl.load(values + layer * E + experts_N, mask=used_N, other=0.0)
        tl.store(values + layer * E + experts_N, counts_N + 1.0, mask=used_N)
    if RULE == STAMP:
        stamps_N = tl.load(after + layer * E + experts_N, mask=used_N, other=0.0)
        tl.store(before + layer * E + experts_N, stamps_N, mask=used_N)


@triton.jit
def follow_uses(experts_E, used_E, before, after, layer, E: tl.constexpr):
    """Under CYCLE: move the means of all the layer's experts."""
    at_E, is_expert = layer * E + experts_E, experts_E < E
    uses_E = used_E.to(tl.float64)
    recent_E = tl.load(before + at_E, mask=is_expert, other=0.0) * RECENT_FADE
    usual_E = tl.load(after + at_E, mask=is_expert, other=0.0) * USUAL_FADE
    tl.store(before + at_E, recent_E + uses_E * (1.0 - RECENT_FADE), mask=is_expert)
    tl.store(after + at_E, usual_E + uses_E * (1.0 - USUAL_FADE), mask=is_expert)


@triton.jit
def touch_call(
    experts_E, called_E, values, before, after, clock, layer, E: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Tell the rule of all experts of a call, in the order of their ids."""
    rank_E = tl.cumsum(called_E.to(tl.int32), 0) - 1
    num_called = tl.sum(called_E.to(tl.int32), 0)
    touch(experts_E, called_E, rank_E, num_called, values, before, after, clock, layer, E, RULE)
    if RULE == CYCLE:
        follow_uses(experts_E, called_E, before, after, layer, E)
    tl.debug_barrier()  # other threads read the values


@triton.jit
def update_trust(first_choices, trust, used_E, BLOCK_E: tl.constexpr):
    """Credit each predictor whose favourite was used, once the next layer's routes are known."""
    experts_E = tl.arange(0, BLOCK_E)
    for predictor in tl.static_range(2):
        choice = tl.load(first_choices + predictor)
        if choice >= 0:
            right = tl.sum((used_E & (experts_E == choice)).to(tl.float32), 0)
            before = tl.load(trust + predictor)
            tl.store(trust + predictor, TRUST_DECAY * before + (1.0 - TRUST_DECAY) * right)


@triton.jit
def give_slots(
    used_E, later_E, missed_E, num_missed, slots_E, slot_of_key, key_of_slot, rest, sent, moved,
    values, before, after, layer, S, E: tl.constexpr, RULE: tl.constexpr, PREFETCH: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Give each missed expert the slot of lowest value that this range does not need, those of
    later ranges (`later_E`) after all others.

    Returns the slots of all experts.
    """
    experts_E = tl.arange(0, BLOCK_E)
    missed_rank_E = tl.cumsum(missed_E.to(tl.int32), 0) - 1
    index_S = tl.arange(0, BLOCK_S)
    keys_S = tl.load(key_of_slot + index_S, mask=index_S < S, other=FREE)
    worth_S = slot_values(keys_S, values, before, after, layer, E, RULE).to(tl.float64)
    own_S = keys_S - layer * E
    is_own_S = (own_S >= 0) & (own_S < E)
    asked_E = used_E.to(tl.int32) + 2 * later_E.to(tl.int32)
    asked_S = tl.where(is_own_S, tl.gather(asked_E, tl.where(is_own_S, own_S, 0), 0), 0)
    worth_S = tl.where(asked_S == 2, LATER, worth_S)
    pinned_S = asked_S == 1
    worth_S = tl.where(pinned_S | (index_S >= S), float("inf"), worth_S)
    taken_S = index_S < 0
    i = 0
    while i < num_missed:
        victim = tl.argmin(worth_S, axis=0)
        expert = tl.sum(tl.where(missed_E & (missed_rank_E == i), experts_E, 0), 0)
        evicted = tl.sum(tl.where(index_S == victim, keys_S, 0), 0)
        if evicted >= 0:
            tl.store(slot_of_key + evicted, FREE)
        tl.store(slot_of_key + layer * E + expert, victim)
        tl.store(key_of_slot + victim, layer * E + expert)
        worth_S = tl.where(index_S == victim, float("inf"), worth_S)
        taken_S = taken_S | (index_S == victim)
        slots_E = tl.where(experts_E == expert, victim, slots_E)
        i += 1
    if PREFETCH:
        give_up_parts(taken_S, index_S, rest, sent, moved)
    return slots_E


@triton.jit
def write_plan(
    experts_U, slots_U, order_U, counts, experts_E, slots_E, used_E, fetched_E, away_E, rank_E,
    num_away, SHARE: tl.constexpr,
):  # fmt: skip
    """Write what `plan` found: the experts in ascending order, and in that in which they run."""
    fetched_rank_E = tl.cumsum(fetched_E.to(tl.int32), 0) - 1
    num_used, num_fetched = tl.sum(used_E.to(tl.int32), 0), tl.sum(fetched_E.to(tl.int32), 0)
    tl.store(experts_U + rank_E, experts_E, mask=used_E)
    tl.store(slots_U + rank_E, slots_E, mask=used_E)
    turn_E = tl.where(fetched_E, fetched_rank_E, num_fetched + rank_E - fetched_rank_E - 1)
    if SHARE:
        away_rank_E = tl.cumsum(away_E.to(tl.int32), 0) - 1
        turn_E = tl.where(fetched_E, turn_E, turn_E - away_rank_E - 1)
        turn_E = tl.where(away_E, num_used - num_away + away_rank_E, turn_E)
    tl.store(order_U + turn_E, rank_E, mask=used_E)
    tl.store(counts, num_used)
    tl.store(counts + 1, num_fetched)
    tl.store(counts + 2, num_away)


@triton.jit(
    do_not_specialize=["layer", "first", "end", "num_pairs", "S"],
    do_not_specialize_on_alignment=[
        "experts_U", "slots_U", "order_U", "first_U", "counts", "routes", "moved",
    ],
)  # fmt: skip
def plan(
    ids, experts_U, slots_U, order_U, first_U, counts,
    slot_of_key, key_of_slot, values, before, after, clock, rest, sent,
    routes, moved, moves, cursor, first_choices, trust,
    x, doorbell, bell, share, away_U,
    layer, first, end, num_pairs, S, E: tl.constexpr, RULE: tl.constexpr, PREFETCH: tl.constexpr,
    DEPTH: tl.constexpr, NUM_CHUNKS: tl.constexpr, SHARE: tl.constexpr, ORDER: tl.constexpr,
    X: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Plan the experts first .. end - 1 of one expert call; what concerns all of it, with first 0.

    ids: int64 [P] expert of each (token, k) pair; ids outside 0 .. E-1 are of no expert.
    experts_U, slots_U: int32, the distinct experts ascending, and their slots.
    order_U: int32, positions in experts_U: first those whose bytes have to be fetched, last those
        that the CPU computes.
    counts: int32 [3], how many are distinct, how many to be fetched, how many the CPU's.
    PREFETCH: experts are sent ahead (`transfer`), in moves that end here; `moved` counts them.
        first_U: int32, the first chunk of each expert that has not come.
    SHARE: of m missed experts of a single token x, the CPU computes share[m], those of least value
        after this step: `doorbell.ring`. away_U: int32, their positions in experts_U.
    """
    pairs_P = tl.arange(0, BLOCK_P)
    ids_P = tl.load(ids + pairs_P, mask=pairs_P < num_pairs, other=-1).to(tl.int32)
    tl.store(routes + pairs_P, ids_P, mask=pairs_P < num_pairs)
    experts_E = tl.arange(0, BLOCK_E)
    asked_PE = ids_P[:, None] == experts_E[None, :]
    called_E = (tl.max(asked_PE.to(tl.int32), axis=0) > 0) & (experts_E < E)
    if SHARE:
        next_E = next_values(experts_E, values, before, after, layer, E, RULE)
    if first == 0:
        touch_call(experts_E, called_E, values, before, after, clock, layer, E, RULE)
        if PREFETCH:
            update_trust(first_choices, trust, called_E, BLOCK_E)
            settle(moves, cursor, slot_of_key, key_of_slot, rest, sent, moved, DEPTH, NUM_CHUNKS)
            tl.store(first_choices + tl.arange(0, 2), FREE)
    used_E = called_E & (experts_E >= first) & (experts_E < end)
    later_E = called_E & (experts_E >= end)
    rank_E = tl.cumsum(used_E.to(tl.int32), 0) - 1

    slots_E = tl.load(slot_of_key + layer * E + experts_E, mask=experts_E < E, other=FREE)
    missed_E = used_E & (slots_E == FREE)
    num_missed = tl.sum(missed_E.to(tl.int32), 0)
    num_away, away_E = 0, experts_E < 0
    if SHARE:
        num_away = tl.load(share + num_missed)
        away_E = leave_to_cpu(
            missed_E, num_away, next_E, rank_E, experts_E, x, doorbell, bell, away_U, layer, ORDER,
            X, H, BLOCK_H,
        )  # fmt: skip
        missed_E = missed_E & (away_E == 0)
        num_missed -= num_away
    fetched_E = missed_E
    if PREFETCH:
        lacking_E = take_parts(used_E, slots_E, rest, sent, moved)
        tl.store(first_U + rank_E, tl.where(lacking_E > 0, NUM_CHUNKS - lacking_E, 0), mask=used_E)
        fetched_E = missed_E | (lacking_E > 0)

    if num_missed > 0:
        slots_E = give_slots(
            used_E, later_E, missed_E, num_missed, slots_E, slot_of_key, key_of_slot, rest, sent,
            moved, values, before, after, layer, S, E, RULE, PREFETCH, BLOCK_E, BLOCK_S,
        )  # fmt: skip

    write_plan(
        experts_U, slots_U, order_U, counts, experts_E, slots_E, used_E, fetched_E, away_E, rank_E,
        num_away, SHARE,
    )  # fmt: skip
