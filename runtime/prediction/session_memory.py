"""The session memory: what earlier moments of this session were followed by.

A log of the newest tokens and their true routes, over all sequences. Each entry knows the entry
before it in its own sequence, and, as the tokens after it run, what was used in its own step, in
the next, in the next H and in the next FAR * H:

    entry    token    before    used: this    next    H    FAR * H
    0        the      -         ...           ...     ...  ...
    1        cache    0         ...           ...     ...  ...
    2        evicts   1         ...           ...     -    -        <- not known yet

An entry speaks for a token about to run where its tokens are the same ("the cache" again), or where
its signature is alike (`signature`). So a text, a format or a language that the predictor has never
seen is known as soon as it repeats itself, word by word or in kind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from routing.predictor_file.format import FAR
from routing.topology import NO_EXPERT, Stack
from runtime.prediction.signature import SIZE, Signatures

CAPACITY = 8192
"""Tokens that are remembered: L * E / 2 + 0.6 KB each."""
MATCHES = 8
"""Earlier places of the same token that are looked at: the newest."""
AGREEMENT = np.array([1.0, 8.0, 64.0])
"""Weight of a place by how many tokens before it agree too."""
AGEING = 0.9
"""Weight of a place beside the next newer one."""
ALIKE = 16
"""Earlier places that are looked at because their signatures are closest."""
SHARPNESS, LIKENESS_WEIGHT = 14.0, 50.0
"""A place of cosine c weighs LIKENESS_WEIGHT * exp(SHARPNESS * (c - 1))."""
MEMORY = 0.98
"""Fading of the frequency of use, which counts as one more place."""

MOST_SEQUENCES = 8
"""Sequences that decode together beyond which nothing is recalled: they use most experts anyway."""

Place = int | None
"""Where the memory keeps a token; None if nowhere."""
NOWHERE = -1


class Cue(NamedTuple):
    """A token about to run, as the memory knows it."""

    before: Place
    """The place of the token before it; None where there is none, or it is not known."""
    token: int
    signature: np.ndarray
    """float32 [SIZE], of length 1."""


class SessionMemory:
    """Recalls, for a token about to run, what its like used, and what followed."""

    def __init__(self, stack: Stack, horizon: int, capacity: int = CAPACITY) -> None:
        self._shape = stack.num_layers, stack.num_experts
        self._capacity, self._num_keys = capacity, stack.num_layers * stack.num_experts
        self._first_key_L1 = np.arange(stack.num_layers)[:, None] * stack.num_experts
        self._delays = 1, horizon, FAR * horizon
        self._used = np.zeros((capacity, 4, -(-self._num_keys // 8)), np.uint8)
        self._num_known = np.zeros(capacity, np.int64)
        self._tokens = np.full(capacity, -1, np.int64)
        self._before = np.full(capacity, NOWHERE)
        self._signatures = np.zeros((capacity, SIZE), np.float32)
        self._trails = np.zeros((capacity, SIZE), np.float32)
        self._signer = Signatures(self._num_keys)
        self._index: dict[tuple[int, ...], deque[int]] = {}
        self._index_keys: list[list[tuple[int, ...]]] = [[] for _ in range(capacity)]
        self._count = 0
        self._uses = np.zeros(self._num_keys, np.float32)
        self._num_faded = 0.0
        self._usual: np.ndarray | None = None
        self._spans = np.array([[1], [1], [horizon], [FAR * horizon]], np.float32)

    def cue(self, before: Place, token: int, next_logits_LE: np.ndarray) -> Cue:
        """The cue of a token; next_logits_LE: the predictor's, of use by the token after it."""
        previous = self._known(before)
        trail = np.zeros(SIZE, np.float32)
        if previous is not None:
            trail = self._trails[previous % self._capacity]
        return Cue(previous, token, self._signer.sign(trail, next_logits_LE))

    def add(self, cue: Cue, routes_LK: np.ndarray) -> Place:
        """Remember the routes of a token, and return its place; None if they are unknown."""
        used = np.zeros(self._num_keys, bool)
        keys = (routes_LK + self._first_key_L1)[routes_LK != NO_EXPERT]
        if not len(keys):
            return None
        used[keys] = True
        place, self._count = self._count, self._count + 1
        entry = place % self._capacity
        if place >= self._capacity:
            self._forget(entry)
        previous = self._known(cue.before)
        self._tokens[entry] = cue.token
        self._before[entry] = NOWHERE if previous is None else previous
        self._signatures[entry] = cue.signature
        trail = np.zeros(SIZE) if previous is None else self._trails[previous % self._capacity]
        self._trails[entry] = self._signer.trail(trail, keys)
        self._used[entry, 0], self._num_known[entry] = np.packbits(used), 1
        self._complete(entry)
        self._index_keys[entry] = self._contexts(previous, cue.token)
        for context in self._index_keys[entry]:
            self._index.setdefault(context, deque(maxlen=MATCHES)).append(place)
        self._uses *= MEMORY
        self._uses += np.float32(1 - MEMORY) * used
        self._num_faded = self._num_faded * MEMORY + 1 - MEMORY
        self._usual = None
        return place

    def recall(self, cue: Cue) -> np.ndarray:
        """Probabilities of use, float32 [2, 4, L, E], by places of the same token, and by places
        alike: in the step of the token, in the next, and in the next H and FAR * H.
        """
        return np.stack([self.recall_same(cue.before, cue.token), self.recall_alike(cue)])

    def recall_same(self, before: Place, token: int) -> np.ndarray:
        """By places of the same token alone, [4, L, E]; it needs no prediction."""
        return self._mean_use(*self._same(before, token))

    def recall_alike(self, cue: Cue) -> np.ndarray:
        """By places alike, [4, L, E]."""
        return self._mean_use(*self._alike(cue))

    def _usual_use(self) -> np.ndarray:
        """What is usual, [4, keys]: each key's fading frequency of use, over each head's steps."""
        if self._usual is None:
            once = (self._uses + 0.06) / np.float32(self._num_faded + 0.5)
            self._usual = -np.expm1(self._spans * np.log1p(-once))
        return self._usual

    def _known(self, place: Place) -> Place:
        """The place; None if it is forgotten."""
        return None if place is None or place < self._count - self._capacity else place

    def _complete(self, entry: int) -> None:
        """Tell the entries before this one, the newest, what was used within their heads' steps."""
        chain = [entry]
        while len(chain) <= self._delays[-1]:
            previous = self._before[chain[-1]]
            if previous == NOWHERE or previous < self._count - self._capacity:
                break
            chain.append(previous % self._capacity)
        for head, delay in enumerate(self._delays, 1):
            if delay < len(chain):
                used = np.bitwise_or.reduce(self._used[chain[:delay], 0])
                self._used[chain[delay], head] = used
                self._num_known[chain[delay]] = head + 1

    def _contexts(self, previous: Place, token: int) -> list[tuple[int, ...]]:
        """What an entry is found by: its token, and its last two tokens."""
        if previous is None:
            return [(token,)]
        return [(int(self._tokens[previous % self._capacity]), token), (token,)]

    def _same(self, before: Place, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Entries of the same token that say most, and their weights."""
        previous, found = self._known(before), set[int]()
        for context in self._contexts(previous, token):
            found.update(self._index.get(context, ()))
        entries = np.array(sorted(found, reverse=True), np.int64) % self._capacity
        agreed, agrees = np.zeros(len(entries), np.int64), np.ones(len(entries), bool)
        theirs, oldest = entries, self._count - self._capacity
        ours = NOWHERE if previous is None else previous
        for _ in AGREEMENT[1:]:
            earlier = self._before[theirs]
            agrees &= (earlier != NOWHERE) & (earlier >= oldest)
            theirs = earlier % self._capacity
            if ours == NOWHERE or ours < oldest:
                break
            agrees &= self._tokens[theirs] == self._tokens[ours % self._capacity]
            agreed += agrees
            ours = int(self._before[ours % self._capacity])
        weights = AGREEMENT[agreed] * AGEING ** np.arange(len(entries))
        best = np.argsort(-weights, kind="stable")[:MATCHES]
        return entries[best], weights[best]

    def _alike(self, cue: Cue) -> tuple[np.ndarray, np.ndarray]:
        """The entries whose signatures are closest, and their weights."""
        cosines = self._signatures[: self._count] @ cue.signature
        entries = np.arange(len(cosines))
        if len(cosines) > ALIKE:
            entries = np.argpartition(cosines, -ALIKE)[-ALIKE:]
        weights = LIKENESS_WEIGHT * np.exp(SHARPNESS * (cosines[entries] - 1))
        return entries, weights

    def _mean_use(self, entries: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The weighted mean [4, L, E] of what entries used, with what is usual as one more."""
        used = np.unpackbits(self._used[entries], axis=-1, count=self._num_keys)
        used_N4 = used.astype(np.float32)
        mean = self._usual_use().copy()
        for head, row in enumerate(mean):
            known = (weights * (self._num_known[entries] > head)).astype(np.float32)
            row += known @ used_N4[:, head]
            row /= 1 + known.sum()
        return mean.reshape(4, *self._shape)

    def _forget(self, entry: int) -> None:
        """Take the entry, the oldest, out of the index."""
        for context in self._index_keys[entry]:
            places = self._index[context]
            if places[0] % self._capacity == entry:
                places.popleft()
            if not places:
                del self._index[context]


def join_recalled(recalled: Sequence[np.ndarray]) -> np.ndarray:
    """What was recalled for each of several sequences, as for any of them."""
    if len(recalled) == 1:
        return recalled[0]
    joined: np.ndarray = 1 - np.prod([1 - one for one in recalled], axis=0)
    return joined
