"""The choice of what is sent ahead, inside a captured step: the experts that the coming layers and
the next token will miss.

`pick` runs beside the experts of a layer, and once before the first. It puts the likeliest experts
in order, gives them slots, and `fetch` (`transfer`) brings them while the link has nothing else to
do: from the moment the layer's missing experts have arrived to the moment the next is planned. Then
it stops, wherever it is. What has come of an expert stays in its slot, for its own layer, which
brings the rest, or until another is worth more. So nothing waits for a prefetch, and a wrong one
costs link time that was idle.

The next layer's experts are judged by its own router, applied to this layer's hidden states, those
of later layers and of the next token by the trained predictor; without one, under CYCLE, by how
often they are used. Router and predictor are weighed by how often their first choices for the
next layer were right of late (`trust`, an exponential mean kept by the plan).

    worth   chance + (1 - chance) * weight * value    value: the policy's, where they are in 0 .. 1
    order   worth * URGENCY ** (layers until it is needed), the weight being IN_ORDER

No slot is taken from an expert whose value is above this worth, the weight being A_STEP_LATER.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from runtime.cuda.kernels.plan import CYCLE, RECENT, TABLE, USUAL, slot_values
from runtime.cuda.kernels.transfer import (
    EVICTED,
    FIRST,
    FREE,
    ITS_REST,
    ITS_SENT,
    KEY,
    SLOT,
)

IN_ORDER = tl.constexpr(0.5)
A_STEP_LATER = tl.constexpr(0.85)
"""About the policies' discount of a use that is a step away."""
URGENCY = 0.9
LOG_URGENCY = tl.constexpr(math.log2(URGENCY))


@triton.jit
def router_probabilities(
    x, router, bias, num_tokens, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The probability [E] that any of the tokens goes to each expert, from the router's logits.

    It is a logistic function of the distance to the K-th highest logit, in units of their spread.
    """
    experts_E = tl.arange(0, BLOCK_E)
    is_expert = experts_E < E
    unused_E = tl.full([BLOCK_E], 1.0, tl.float32)
    token = 0
    while token < num_tokens:
        sums_EH = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
        for start in range(0, H, BLOCK_H):
            column_H = start + tl.arange(0, BLOCK_H)
            mask_EH = is_expert[:, None] & (column_H < H)[None, :]
            at_EH = experts_E[:, None] * H + column_H[None, :]
            rows_EH = tl.load(router + at_EH, mask=mask_EH, other=0.0).to(tl.float32)
            x_H = tl.load(x + token * H + column_H, mask=column_H < H, other=0.0).to(tl.float32)
            sums_EH += rows_EH * x_H[None, :]
        logits_E = tl.sum(sums_EH, axis=1)
        if HAS_BIAS:
            logits_E += tl.load(bias + experts_E, mask=is_expert, other=0.0).to(tl.float32)
        logits_E = tl.where(is_expert, logits_E, float("-inf"))
        left_E = logits_E
        kth = tl.max(left_E, axis=0)
        top = kth
        k = 1
        while k < K:
            left_E = tl.where(left_E >= kth, float("-inf"), left_E)
            kth = tl.max(left_E, axis=0)
            k += 1
        spread = tl.maximum((top - kth) / K, 1e-6)
        unused_E *= 1.0 - tl.sigmoid((logits_E - kth) / spread)
        token += 1
    return 1.0 - unused_E


@triton.jit
def favourite(chances_E):
    """The most likely expert; -1 where none can be."""
    return tl.where(tl.max(chances_E, axis=0) > 0.0, tl.argmax(chances_E, axis=0), -1)


@triton.jit
def next_layers_chances(
    x, router, bias, forecast_E, open_E, trust, first_choices, num_tokens, H: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, HAS_ROUTER: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_FORECAST: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Of the next layer's experts: what its own router says early, or the forecast where that is
    more, each as far as it is trusted; their favourites are kept for the plan to judge.
    """
    chance_E = tl.zeros([BLOCK_E], tl.float32)
    if HAS_ROUTER:
        chance_E = router_probabilities(
            x, router, bias, num_tokens, H, E, K, HAS_BIAS, BLOCK_E, BLOCK_H
        )
        tl.store(first_choices, favourite(tl.where(open_E, chance_E, 0.0)))
        chance_E *= tl.load(trust)
    if HAS_FORECAST:
        tl.store(first_choices + 1, favourite(tl.where(open_E, forecast_E, 0.0)))
        chance_E = tl.maximum(chance_E, forecast_E * tl.load(trust + 1))
    return chance_E


@triton.jit
def later_chances(
    key_N, is_key_N, has_run_N, forecast, following, trust, before, after, RULE: tl.constexpr,
    HAS_FORECAST: tl.constexpr,
):  # fmt: skip
    """Of all experts, in the next run of their layers: by the forecast of this step and the next,
    or by the policy's means of uses; 0 where nothing is known.
    """
    chance_N = tl.zeros_like(key_N).to(tl.float32)
    if HAS_FORECAST:
        chance_N = tl.load(forecast + key_N, mask=is_key_N & (has_run_N == 0), other=0.0)
        chance_N += tl.load(following + key_N, mask=is_key_N & has_run_N, other=0.0)
        chance_N *= tl.load(trust + 1)
    elif RULE == CYCLE:
        recent_N = tl.load(before + key_N, mask=is_key_N, other=0.0)
        usual_N = tl.load(after + key_N, mask=is_key_N, other=0.0)
        chance_N = (recent_N * RECENT + usual_N * USUAL).to(tl.float32)
    return chance_N


@triton.jit
def worth_of(
    key_N, chance_N, values, before, after, layer, WEIGHT: tl.constexpr, E: tl.constexpr,
    RULE: tl.constexpr,
):  # fmt: skip
    """What a slot would be worth to experts of these chances."""
    worth_N = chance_N
    if (RULE == TABLE) | (RULE == CYCLE):
        value_N = slot_values(key_N, values, before, after, layer - 1, E, RULE).to(tl.float32)
        worth_N += (1.0 - chance_N) * WEIGHT * tl.minimum(tl.maximum(value_N, 0.0), 1.0)
    return worth_N


@triton.jit
def values_of_victims(
    slots_U, counts, key_of_slot, values, before, after, layer, S, E: tl.constexpr,
    RULE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The value of each slot's owner; inf for those that the running plan uses."""
    index_S = tl.arange(0, BLOCK_S)
    keys_S = tl.load(key_of_slot + index_S, mask=index_S < S, other=FREE)
    value_S = slot_values(keys_S, values, before, after, layer - 1, E, RULE).to(tl.float64)
    value_S = tl.where(index_S < S, value_S, float("inf"))
    num_used = tl.load(counts)
    at = 0
    while at < num_used:
        value_S = tl.where(index_S == tl.load(slots_U + at), float("inf"), value_S)
        at += 1
    return keys_S, value_S


@triton.jit
def list_moves(
    order_N, worth_N, key_N, slot_N, keys_S, value_S, moves, slot_of_key, key_of_slot, rest, sent,
    RULE: tl.constexpr, DEPTH: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write the first experts of the order into `moves`, and give them slots."""
    index_S = tl.arange(0, BLOCK_S)
    for move in tl.static_range(DEPTH):
        key = tl.argmax(order_N, axis=0)
        is_wanted = tl.max(order_N, axis=0) > 0.0
        slot = tl.sum(tl.where(key_N == key, slot_N, 0), 0)
        worth = tl.sum(tl.where(key_N == key, worth_N, 0.0), 0)
        order_N = tl.where(key_N == key, 0.0, order_N)
        chosen = FREE
        if is_wanted & (slot >= 0):
            chosen = key
            tl.store(moves + FIRST * DEPTH + move, NUM_CHUNKS - tl.load(rest + slot))
        elif is_wanted:
            slot = tl.argmin(value_S, axis=0)
            least = tl.min(value_S, axis=0)
            is_worth_it = least < float("inf")
            if (RULE == TABLE) | (RULE == CYCLE):
                is_worth_it = is_worth_it & (least < worth)
            if is_worth_it:
                chosen = key
                evicted = tl.sum(tl.where(index_S == slot, keys_S, 0), 0)
                tl.store(moves + FIRST * DEPTH + move, 0)
                tl.store(moves + EVICTED * DEPTH + move, evicted)
                tl.store(moves + ITS_REST * DEPTH + move, tl.load(rest + slot))
                tl.store(moves + ITS_SENT * DEPTH + move, tl.load(sent + slot))
                tl.store(rest + slot, NUM_CHUNKS)
                tl.store(sent + slot, 0)
                if evicted >= 0:
                    tl.store(slot_of_key + evicted, FREE)
                tl.store(slot_of_key + key, slot)
                tl.store(key_of_slot + slot, key)
                order_N = tl.where(key_N == evicted, 0.0, order_N)
        if chosen >= 0:
            value_S = tl.where(index_S == slot, float("inf"), value_S)
        tl.store(moves + KEY * DEPTH + move, chosen)
        tl.store(moves + SLOT * DEPTH + move, slot)


@triton.jit(
    do_not_specialize=["layer", "reach", "num_tokens", "S"],
    do_not_specialize_on_alignment=["slots_U", "counts"],
)
def pick(
    x, router, bias, forecast, following, trust, first_choices, moves, cursor, slots_U, counts,
    slot_of_key, key_of_slot, rest, sent, values, before, after,
    threshold, layer, reach, num_tokens, S, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    LAYERS: tl.constexpr, RULE: tl.constexpr, DEPTH: tl.constexpr, NUM_CHUNKS: tl.constexpr,
    HAS_ROUTER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FORECAST: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """List the moves from now until `layer` (the next; L at the end of a step) is planned.

    slots_U, counts: the plan of the layer that runs now; its slots are not taken.
    forecast, following: float32 [L * E], chances of use in this step and in the next.
    threshold: least chance of a move. reach: layers ahead that are looked at, `layer` the first.
    first_choices: int32 [2], receives the favourites of router and predictor in `layer`.
    """
    key_N = tl.arange(0, BLOCK_N)
    is_key_N = key_N < LAYERS * E
    has_run_N = key_N // E < layer
    slot_N = tl.load(slot_of_key + key_N, mask=is_key_N, other=FREE)
    rest_N = tl.load(rest + slot_N, mask=slot_N >= 0, other=0)
    is_open_N = is_key_N & ((slot_N == FREE) | (rest_N > 0))
    chance_N = later_chances(
        key_N, is_key_N, has_run_N, forecast, following, trust, before, after, RULE, HAS_FORECAST
    )
    if HAS_ROUTER | HAS_FORECAST:
        expert_E = tl.arange(0, BLOCK_E)
        is_next_E = (expert_E < E) & (layer < LAYERS)
        slot_E = tl.load(slot_of_key + layer * E + expert_E, mask=is_next_E, other=FREE)
        rest_E = tl.load(rest + slot_E, mask=is_next_E & (slot_E >= 0), other=0)
        is_open_E = is_next_E & ((slot_E == FREE) | (rest_E > 0))
        forecast_E = tl.zeros([BLOCK_E], tl.float32)
        if HAS_FORECAST:
            forecast_E = tl.load(forecast + layer * E + expert_E, mask=is_next_E, other=0.0)
        next_E = next_layers_chances(
            x, router, bias, forecast_E, is_open_E, trust, first_choices, num_tokens, H, E, K,
            HAS_ROUTER, HAS_BIAS, HAS_FORECAST, BLOCK_E, BLOCK_H,
        )  # fmt: skip
        own_N = key_N - layer * E
        is_next_N = is_key_N & (own_N >= 0) & (own_N < E)
        if HAS_ROUTER:
            known_N = tl.gather(next_E, tl.where(is_next_N, own_N, 0), 0)
            chance_N = tl.where(is_next_N, known_N, chance_N)
    ahead_N = key_N // E - layer
    ahead_N = tl.where(ahead_N < 0, ahead_N + LAYERS, ahead_N)
    safe_N = tl.where(is_key_N, key_N, 0)
    worth_N = worth_of(safe_N, chance_N, values, before, after, layer, A_STEP_LATER, E, RULE)
    order_N = worth_of(safe_N, chance_N, values, before, after, layer, IN_ORDER, E, RULE)
    order_N *= tl.exp2(ahead_N.to(tl.float32) * LOG_URGENCY)
    is_listed_N = is_open_N & (chance_N >= threshold) & (ahead_N < reach)
    order_N = tl.where(is_listed_N, order_N, 0.0)
    keys_S, value_S = values_of_victims(
        slots_U, counts, key_of_slot, values, before, after, layer, S, E, RULE, BLOCK_S
    )
    tl.debug_barrier()  # all threads have read the tables
    list_moves(
        order_N, worth_N, key_N, slot_N, keys_S, value_S, moves, slot_of_key, key_of_slot, rest,
        sent, RULE, DEPTH, NUM_CHUNKS, BLOCK_S,
    )  # fmt: skip
    tl.store(cursor, 0)
