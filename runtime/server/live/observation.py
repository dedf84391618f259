"""An observation: the steps of a serving loop, from when somebody begins to watch.

It counts from the end of the first step that it sees, with a shadow that began that step with the
same experts in its slots. The thread of the steps only reads the counts; whoever asks for the
newest step runs the shadow up to it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from routing.topology import NO_EXPERT
from runtime.cache.stats import Stats
from runtime.server.live.shadow import LRUShadow
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.steps.watch import Sighting

MOST_PENDING = 64
"""Steps that wait for somebody to ask; beyond, the thread of the steps runs the shadow itself."""
LAYERS = 8
"""Layers that the shadow runs without a break."""

Counts = dict[str, float]


class Seen(NamedTuple):
    """A step, and all counts up to its end."""

    number: int
    """1 for the first step seen."""
    sighting: Sighting
    keys: np.ndarray
    """Ascending int64 keys (layer * E + expert) that the step used."""
    counts: Counts


class Observation:
    """What has been seen so far. `see` is for the thread of the steps, `newest` for any other."""

    def __init__(self, loop: ServingLoop, stats: Stats) -> None:
        self._loop, self._stats = loop, stats
        self._pending: deque[tuple[Sighting, Counts]] = deque()
        self._lock = threading.Lock()
        """Held by whoever catches up."""
        self._shadow = LRUShadow(0, 1)
        self._before: Counts = {}
        self._number = 0
        self._newest: Seen | None = None

    def see(self, sighting: Sighting) -> None:
        """A step has run."""
        self._pending.append((sighting, self._totals()))
        if len(self._pending) > MOST_PENDING:
            self._catch_up()

    def newest(self) -> Seen | None:
        """The last step that was seen."""
        self._catch_up()
        return self._newest

    def _catch_up(self) -> None:
        with self._lock:
            totals: Counts = {}
            while self._pending:
                sighting, totals = self._pending.popleft()
                keys = self._run_shadow(sighting)
                if not self._before:
                    self._before = self._compared(totals)
            if totals:
                compared, before = self._compared(totals), self._before
                counts = {name: compared[name] - before[name] for name in compared}
                self._newest = Seen(self._number, sighting, keys, counts)

    def _run_shadow(self, sighting: Sighting) -> np.ndarray:
        """The keys that the step used, which the shadow has served."""
        keys = used_keys(sighting)
        if self._number == 0:
            self._shadow = shadow_of(sighting, self._stats.num_slots)
        self._number += 1
        edges = layer_edges(keys, sighting.missing_LE.shape[1])
        for start, end in pairwise([0, *edges.tolist(), len(keys)]):
            self._shadow.step(keys[start:end].tolist())
            time.sleep(0)  # lets the thread of the steps go on, should it wait for the interpreter
        return keys

    def _compared(self, totals: Counts) -> Counts:
        """The counts of a moment beside the shadow's."""
        shadow = self._shadow
        return totals | {
            "lru_hits": shadow.hits,
            "lru_misses": shadow.misses,
            "lru_bytes": round(shadow.misses * self._stats.expert_bytes),
        }

    def _totals(self) -> Counts:
        stats, loop = self._stats, self._loop
        return {
            "seconds": time.monotonic(),
            "busy": loop.seconds,
            "steps": loop.num_steps,
            "tokens": loop.num_generated,
            "prompt_tokens": loop.num_prefilled,
            "hits": stats.hits,
            "late": stats.late,
            "misses": stats.misses,
            "bytes": stats.bytes_loaded,
            "wasted": stats.bytes_wasted,
            "prefetched": stats.prefetches,
            "prefetched_used": stats.prefetches_used,
            "on_cpu": stats.computed_on_cpu,
        }


def shadow_of(sighting: Sighting, num_slots: int) -> LRUShadow:
    """A shadow with what was in slots when the step began; nobody knows in which order it came."""
    residents = np.flatnonzero(sighting.missing_LE.reshape(-1) == 0)
    return LRUShadow(num_slots, sighting.missing_LE.shape[1], residents.tolist())


def layer_edges(keys: np.ndarray, num_experts: int) -> np.ndarray:
    """Where to split ascending keys so that each part is of a few whole layers."""
    last, span = int(keys[-1]) if len(keys) else 0, LAYERS * num_experts
    return np.searchsorted(keys, np.arange(span, last + 1, span))


def used_keys(sighting: Sighting) -> np.ndarray:
    """The distinct keys that a step used, ascending."""
    num_layers, num_experts = sighting.missing_LE.shape
    routes_TLK = sighting.routes_TLK
    first_L1 = np.arange(num_layers)[:, None] * num_experts
    keys = (routes_TLK + first_L1)[routes_TLK != NO_EXPERT]
    used = np.zeros(num_layers * num_experts, bool)
    used[keys] = True
    return np.flatnonzero(used)
