"""LRU's shadow, held to the cache and the policy that run live."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.cache.policies import LRU
from runtime.server.live.observation import layer_edges, shadow_of, used_keys
from runtime.server.live.shadow import LRUShadow
from runtime.serving.steps.watch import Sighting
from runtime.simulation.replay import Simulation

NUM_LAYERS, NUM_EXPERTS = 9, 6
CALLS = st.lists(
    st.lists(st.sets(st.integers(0, NUM_EXPERTS - 1)), min_size=NUM_LAYERS, max_size=NUM_LAYERS),
    max_size=12,
)


def keys_of(step: list[set[int]]) -> list[int]:
    return [
        layer * NUM_EXPERTS + expert for layer, call in enumerate(step) for expert in sorted(call)
    ]


@given(CALLS, st.integers(NUM_EXPERTS, NUM_LAYERS * NUM_EXPERTS))
def test_it_counts_what_the_cache_counts_under_lru(
    steps: list[list[set[int]]], num_slots: int
) -> None:
    shadow = LRUShadow(num_slots, NUM_EXPERTS)
    policy = LRU(NUM_LAYERS, NUM_EXPERTS)
    simulation = Simulation(policy, NUM_LAYERS, NUM_EXPERTS, num_slots)
    for step in steps:
        shadow.step(keys_of(step))
        calls = [
            (layer, np.array(sorted(call), np.int64)) for layer, call in enumerate(step) if call
        ]
        simulation.step(None, calls)
        assert shadow.misses == simulation.loads
        assert shadow.hits == simulation.requests - simulation.loads


@given(CALLS)
def test_a_step_in_parts_of_whole_layers_counts_as_the_whole_step(
    steps: list[list[set[int]]],
) -> None:
    whole, parted = LRUShadow(8, NUM_EXPERTS), LRUShadow(8, NUM_EXPERTS)
    for step in steps:
        keys = keys_of(step)
        whole.step(keys)
        for part in np.split(np.array(keys, np.int64), layer_edges(np.array(keys), NUM_EXPERTS)):
            parted.step(part.tolist())
    assert (whole.hits, whole.misses) == (parted.hits, parted.misses)


def test_it_begins_with_the_experts_that_were_in_slots() -> None:
    missing_LE = np.array([[0, 1, 0], [1, 1, 0]], np.float32)
    routes_TLK = np.array([[[0, 1], [2, -1]]])
    sighting = Sighting(routes_TLK, missing_LE, [], 1, 1)
    assert used_keys(sighting).tolist() == [0, 1, 5]
    shadow = shadow_of(sighting, num_slots=3)
    shadow.step([0, 1, 5])
    assert (shadow.hits, shadow.misses) == (2, 1)
