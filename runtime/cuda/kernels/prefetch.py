"""Prefetching inside a captured step: the choice of an expert that the next layer will miss.

`pick` runs beside the experts of layer l and chooses one expert of layer l + 1 that is not resident
and probably needed. `fetch` (`transfer`) copies it while the link has nothing else to do:
from the moment layer l's missing experts have arrived to the moment layer l + 1 is planned. Then it
stops, wherever it is; the layer fetches the chunks that are still missing. So a prefetch is never
waited for, and a wrong one costs link time that was idle.

Two predictors vote: the next layer's own router applied to this layer's hidden states, and the
probabilities of the trained predictor. Each is weighed by how often its recent first choices
were right (`trust`, an exponential mean kept by the plan).
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.cuda.kernels.plan import FREE, slot_values


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


@triton.jit(
    do_not_specialize=["layer", "num_tokens", "S"],
    do_not_specialize_on_alignment=["prefetched", "prefetched_slot", "slots_U", "counts"],
)
def pick(
    x, router, bias, forecast, trust, first_choices, prefetched, prefetched_slot,
    slots_U, counts, slot_of_key, key_of_slot, values, before, after,
    threshold, layer, num_tokens, S, H: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    RULE: tl.constexpr, HAS_ROUTER: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_FORECAST: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Choose an expert of `layer` (the next) and give it the slot of lowest value.

    slots_U, counts: the plan of the layer that runs now; its slots are not taken.
    prefetched, prefetched_slot: int32 [1], the choice, or -1: nobody is likely enough.
    first_choices: int32 [2], each predictor's favourite among the missing, for the plan to judge.
    """
    experts_E = tl.arange(0, BLOCK_E)
    slots_E = tl.load(slot_of_key + layer * E + experts_E, mask=experts_E < E, other=0)
    missing_E = (experts_E < E) & (slots_E == FREE)
    best_E = tl.zeros([BLOCK_E], tl.float32)
    tl.store(first_choices, -1)
    tl.store(first_choices + 1, -1)
    if HAS_ROUTER:
        routed_E = router_probabilities(
            x, router, bias, num_tokens, H, E, K, HAS_BIAS, BLOCK_E, BLOCK_H
        )
        routed_E = tl.where(missing_E, routed_E, 0.0)
        tl.store(first_choices, favourite(routed_E))
        best_E = routed_E * tl.load(trust)
    if HAS_FORECAST:
        likely_E = tl.load(forecast + layer * E + experts_E, mask=missing_E, other=0.0)
        tl.store(first_choices + 1, favourite(likely_E))
        best_E = tl.maximum(best_E, likely_E * tl.load(trust + 1))
    choice = tl.argmax(best_E, axis=0)
    slot = FREE
    if tl.max(best_E, axis=0) >= threshold:
        index_S = tl.arange(0, BLOCK_S)
        keys_S = tl.load(key_of_slot + index_S, mask=index_S < S, other=FREE)
        worth_S = slot_values(keys_S, values, before, after, layer - 1, E, RULE).to(tl.float64)
        worth_S = tl.where(index_S < S, worth_S, float("inf"))
        num_used = tl.load(counts)
        at = 0
        while at < num_used:
            worth_S = tl.where(index_S == tl.load(slots_U + at), float("inf"), worth_S)
            at += 1
        slot = tl.argmin(worth_S, axis=0)
        if tl.min(worth_S, axis=0) < float("inf"):
            evicted = tl.sum(tl.where(index_S == slot, keys_S, 0), 0)
            if evicted >= 0:
                tl.store(slot_of_key + evicted, FREE)
            tl.store(slot_of_key + layer * E + choice, slot)
            tl.store(key_of_slot + slot, layer * E + choice)
        else:
            slot = FREE
    tl.store(prefetched, tl.where(slot >= 0, choice, -1))
    tl.store(prefetched_slot, slot)
