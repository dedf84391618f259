"""The session memory: the experts that followed the same tokens earlier in this session.

A log of the newest tokens and their true routes, over all sequences. Each entry knows the entry
before it and the one after it in its own sequence:

    entry    token    routes       before    after
    0        the      [L, K]       -         1
    1        cache    [L, K]       0         2       <- "the cache" again: what followed 1, and how
    2        evicts   [L, K]       1         -          often, says what may follow now

So a text, a format or a language that the predictor has never seen is known as soon as it
repeats itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from routing.predictor_file.format import FAR
from routing.topology import NO_EXPERT, Stack

CAPACITY = 8192
"""Tokens that are remembered: 4 * L * K bytes each."""
MATCHES = 8
"""Earlier places that are looked at: the newest of the same two tokens, and of the same one."""
FAR_MATCHES = 2
"""Of those, the best, where many steps after each are looked at."""
AGREEMENT = np.array([1.0, 8.0, 64.0])
"""Weight of a place by how many tokens before it agree too."""
AGEING = 0.9
"""Weight of a place beside the next newer one."""
MEMORY = 0.98
"""Fading of the frequency of use, which counts as one more place."""

MOST_SEQUENCES = 8
"""Sequences that decode together beyond which nothing is recalled: they use most experts anyway."""

Place = int | None
"""Where the memory keeps a token; None if nowhere."""
Index = dict[tuple[int, ...], deque[int]]


class SessionMemory:
    """Recalls, for a token about to run, what its like used, and what followed."""

    def __init__(self, stack: Stack, horizon: int, capacity: int = CAPACITY) -> None:
        self._shape = stack.num_layers, stack.num_experts
        self._capacity, self._nowhere = capacity, capacity
        self._num_keys = stack.num_layers * stack.num_experts
        self._first_key_L1 = np.arange(stack.num_layers)[:, None] * stack.num_experts
        width = stack.num_layers * stack.top_k
        self._keys = np.full((capacity + 1, width), self._num_keys, np.int32)
        self._tokens = np.full(capacity + 1, -1, np.int64)
        self._before = np.full(capacity + 1, self._nowhere)
        self._after = np.full(capacity + 1, self._nowhere)
        self._index: Index = {}
        self._index_keys: list[list[tuple[int, ...]]] = [[] for _ in range(capacity)]
        self._count = 0
        self._uses = np.zeros(self._num_keys + 1, np.float32)
        self._num_faded = 0.0
        self._spans = ((0, 1), (1, 2), (1, 1 + horizon), (1, 1 + FAR * horizon))

    def add(self, before: Place, token: int, routes_LK: np.ndarray) -> Place:
        """Remember the routes of a token, and return its place; None if they are unknown.

        before: the place of the token before it; None where there is none, or it is not known.
        """
        if (routes_LK == NO_EXPERT).all():
            return None
        place, self._count = self._count, self._count + 1
        entry, previous = place % self._capacity, self._entry(before)
        if place >= self._capacity:
            self._forget(entry)
            previous = self._nowhere if previous == entry else previous
        keys_LK = np.where(routes_LK == NO_EXPERT, self._num_keys, routes_LK + self._first_key_L1)
        self._keys[entry] = keys_LK.reshape(-1)
        self._tokens[entry] = token
        self._before[entry], self._after[entry] = previous, self._nowhere
        if previous != self._nowhere:
            self._after[previous] = entry
        self._index_keys[entry] = self._contexts(previous, token)
        for context in self._index_keys[entry]:
            self._index.setdefault(context, deque(maxlen=MATCHES)).append(place)
        self._uses *= MEMORY
        self._uses[self._keys[entry]] += 1 - MEMORY
        self._num_faded = self._num_faded * MEMORY + 1 - MEMORY
        return place

    def recall(self, before: Place, token: int) -> np.ndarray:
        """Probabilities of use, float32 [4, L, E]: in the step of `token`, in the next, and in the
        next H and FAR * H. `before` as in `add`.
        """
        previous = self._entry(before)
        usual = (self._uses[:-1] + 0.06) / np.float32(self._num_faded + 0.5)
        recalled = np.stack([_within(usual, end - start) for start, end in self._spans])
        places = self._places(previous, token)
        if places:
            entries, weights = self._weighed(places, previous)
            chain = self._chain(entries)
            for row, (start, end) in zip(recalled, self._spans, strict=True):
                self._count_uses(row, chain[start:end], weights)
        return recalled.reshape(4, *self._shape)

    def _entry(self, place: Place) -> int:
        """The entry of a place; `_nowhere` if it is forgotten."""
        if place is None or place < self._count - self._capacity:
            return self._nowhere
        return place % self._capacity

    def _contexts(self, previous: int, token: int) -> list[tuple[int, ...]]:
        """What an entry is found by: its token, and its last two tokens."""
        if previous == self._nowhere:
            return [(token,)]
        return [(int(self._tokens[previous]), token), (token,)]

    def _places(self, previous: int, token: int) -> list[int]:
        """Earlier places of the same context, each once, the newest first."""
        found: set[int] = set()
        for context in self._contexts(previous, token):
            found.update(self._index.get(context, ()))
        return sorted(found, reverse=True)

    def _weighed(self, places: list[int], previous: int) -> tuple[np.ndarray, np.ndarray]:
        """The entries that say most, and their weights, the heaviest first."""
        entries = np.array(places) % self._capacity
        agreed, agrees = np.zeros(len(entries), np.int64), np.ones(len(entries), bool)
        theirs = entries
        for _ in AGREEMENT[1:]:
            theirs = self._before[theirs]
            agrees &= (theirs != self._nowhere) & (self._tokens[theirs] == self._tokens[previous])
            agreed += agrees
            previous = self._before[previous]
        weights = AGREEMENT[agreed] * AGEING ** np.arange(len(entries))
        best = np.argsort(-weights, kind="stable")[:MATCHES]
        return entries[best], weights[best].astype(np.float32)

    def _chain(self, entries: np.ndarray) -> np.ndarray:
        """The entries and those after them, int [1 + FAR * H, N]."""
        chain = np.empty((self._spans[-1][1], len(entries)), np.int64)
        chain[0] = entries
        for step in range(1, len(chain)):
            chain[step] = self._after[chain[step - 1]]
        return chain

    def _count_uses(self, usual: np.ndarray, chain_SN: np.ndarray, weights_N: np.ndarray) -> None:
        """Add to `usual` (one place's worth) the uses in the steps of `chain_SN`; in place."""
        if len(chain_SN) > 1:
            chain_SN, weights_N = chain_SN[:, :FAR_MATCHES], weights_N[:FAR_MATCHES]
        complete = chain_SN[-1] != self._nowhere
        chain_SN, weights_N = chain_SN[:, complete], weights_N[complete]
        keys_SNK = self._keys[chain_SN]
        if len(chain_SN) == 1:
            each = np.repeat(weights_N, keys_SNK.shape[-1])
            counts = np.bincount(keys_SNK.reshape(-1), each, self._num_keys + 1)[:-1]
            usual += counts.astype(np.float32)
        else:
            used = np.zeros((len(weights_N), self._num_keys + 1), np.float32)
            used[np.arange(len(weights_N))[:, None], keys_SNK] = 1.0
            usual += weights_N @ used[:, :-1]
        usual /= 1 + weights_N.sum()

    def _forget(self, entry: int) -> None:
        """Take the entry, the oldest, out of the index and out of its sequence."""
        for context in self._index_keys[entry]:
            places = self._index[context]
            if places[0] % self._capacity == entry:
                places.popleft()
            if not places:
                del self._index[context]
        before, after = self._before[entry], self._after[entry]
        if before != self._nowhere:
            self._after[before] = self._nowhere
        if after != self._nowhere:
            self._before[after] = self._nowhere


def join_recalled(recalled: Sequence[np.ndarray]) -> np.ndarray:
    """What was recalled for each of several sequences, as for any of them."""
    if len(recalled) == 1:
        return recalled[0]
    joined: np.ndarray = 1 - np.prod([1 - one for one in recalled], axis=0)
    return joined


def _within(once: np.ndarray, steps: int) -> np.ndarray:
    """Probability of a use within so many steps, from that of one."""
    if steps == 1:
        return once
    return -np.expm1(np.float32(steps) * np.log1p(-once))
