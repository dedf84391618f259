"""Routes with a stated locality, for models of topologies that no trace was made of.

In a real trace a token tends to use what its layer used lately. So experts are drawn by the *rank*
of their last use in the layer: rank r of E has the weight exp(-steepness r / E). The steepness is
found by bisection, for a stated hit rate of LRU with a quarter of the experts resident. At other
sizes the hit rates then are those of real traces within 0.05 (moe-8x32 and moe-16x64, from an
eighth to three quarters; a power of the rank instead of the steepnessial was off by 0.07).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from benchmarks.replay.passages import Passages, RandomText
from routing.topology import Stack

QUARTER = 0.25
DOCUMENTS = 5
"""Documents that the hit rate is measured over; the first only fills the cache."""
LENGTH = 160
"""Tokens of each of them."""
STEEPNESSES = 0.0, 64.0
BISECTIONS = 14


def draw_routes(stack: Stack, steepness: float, length: int, seed: int) -> np.ndarray:
    """Experts of `length` tokens, int64 [T, L, K], in a document that begins anywhere."""
    random = np.random.default_rng(seed)
    layers, experts, top_k = stack.num_layers, stack.num_experts, stack.top_k
    log_weight_E = -steepness * np.arange(experts) / experts
    recent_LE = random.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    routes_TLK = np.empty((length, layers, top_k), np.int64)
    for routes_LK in routes_TLK:
        keys_LE = log_weight_E + random.gumbel(size=(layers, experts))
        ranks_LK = np.argpartition(-keys_LE, top_k - 1, axis=1)[:, :top_k]
        routes_LK[:] = np.take_along_axis(recent_LE, ranks_LK, axis=1)
        order_LE = np.tile(np.arange(top_k, top_k + experts), (layers, 1))
        np.put_along_axis(order_LE, ranks_LK, np.arange(top_k)[None], axis=1)
        recent_LE = np.take_along_axis(recent_LE, np.argsort(order_LE, axis=1), axis=1)
    return routes_TLK


def lru_hit_rate(documents: Sequence[np.ndarray], num_experts: int, share: float) -> float:
    """Hit rate of one LRU cache over all layers, decoding documents [T, L, K] one by one.

    share: of all experts, that are resident. The first document only fills the cache.
    """
    slots = round(share * documents[0].shape[1] * num_experts)
    resident: OrderedDict[int, None] = OrderedDict()
    hits = uses = 0
    for index, routes_TLK in enumerate(documents):
        layer_L1 = np.arange(routes_TLK.shape[1])[:, None]
        keys = (layer_L1 * num_experts + routes_TLK).reshape(-1).tolist()
        for key in keys:
            if key in resident:
                hits += index > 0
                resident.move_to_end(key)
            else:
                resident[key] = None
                if len(resident) > slots:
                    resident.popitem(last=False)
        uses += len(keys) if index else 0
    return hits / uses


def drawn_hit_rate(
    stack: Stack, steepness: float, *, share: float = QUARTER, length: int = LENGTH, seed: int = 0
) -> float:
    """Hit rate of LRU over routes drawn with that steepness."""
    documents = [draw_routes(stack, steepness, length, seed + i) for i in range(DOCUMENTS)]
    return lru_hit_rate(documents, stack.num_experts, share)


def fit_steepness(stack: Stack, hit_rate: float, *, length: int = LENGTH) -> float:
    """The steepness that gives LRU this hit rate with a quarter of the experts resident.

    Raises ValueError for a hit rate that no steepness gives.
    """
    low, high = STEEPNESSES
    least, most = (drawn_hit_rate(stack, edge, length=length) for edge in STEEPNESSES)
    if not least <= hit_rate <= most:
        raise ValueError(
            f"a hit rate of {hit_rate} cannot be drawn for {stack}: give one from {least:.2f} to "
            f"{most:.2f}"
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if drawn_hit_rate(stack, middle, length=length) < hit_rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class LocalText(RandomText):
    """Passages of random tokens, whose routes are drawn with a stated locality."""

    def __init__(self, vocab_size: int, stack: Stack, hit_rate: float) -> None:
        """hit_rate: of LRU with a quarter of the experts resident."""
        super().__init__(vocab_size)
        self._stack = stack
        self.steepness = fit_steepness(stack, hit_rate)
        reached = drawn_hit_rate(stack, self.steepness, seed=DOCUMENTS)
        self.routes = f"drawn, LRU hits {reached:.3f} at a quarter"

    def passages(self, batch: int, length: int, *, first: int) -> Passages:
        """Sequence b is drawn with seed `first` + b."""
        rows = [draw_routes(self._stack, self.steepness, length, first + b) for b in range(batch)]
        passages = super().passages(batch, length, first=first)
        return passages._replace(experts_BTLK=np.stack(rows))
