"""runtime.cache.rules: the order in which each free rule evicts, and the caches simulated only."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cache.belady import Belady, Calls
from runtime.cache.policies import FREE_RULES, POLICIES, QUEUE_CACHES
from runtime.cache.policy import DeviceRule, Policy
from runtime.cache.rules.arc import ARC
from runtime.cache.rules.class_lru import ClassLRU
from runtime.cache.rules.hot_set import HotSet
from runtime.cache.rules.layer_lfru import LayerLFRU
from runtime.cache.rules.lfru import LFRU
from runtime.cache.rules.queue_cache import QueueCache
from runtime.cache.rules.s3_fifo import S3FIFO
from runtime.simulation.replay import BypassSimulation, QueueSimulation, Simulation
from tests.helpers.policies import LAYERS, NUM_EXPERTS, calls_of, make_policy

SHAPE = LAYERS, NUM_EXPERTS
KEYS = LAYERS * NUM_EXPERTS
QUEUE_NAMES = list(QUEUE_CACHES)


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, np.int64)


def order(values: np.ndarray, *keys: int) -> list[int]:
    """The keys from the first to be evicted to the last."""
    return sorted(keys, key=lambda key: (values[key], key))


# ---------------------------------------------------------------------- ClassLRU


def used(policy: Policy, *steps: tuple[int, ...]) -> None:
    """Steps in which layer 0 uses these experts."""
    for experts in steps:
        policy.begin_step(None)
        if experts:
            policy.touch(0, ids(*experts))


def test_class_lru_evicts_the_least_recently_used_of_one_class() -> None:
    policy = ClassLRU(*SHAPE)
    used(policy, (3,), (1,), (2,), ())
    assert order(policy.values, 1, 2, 3) == [3, 1, 2]


def test_class_lru_holds_an_expert_of_twice_the_frequency_twice_as_long() -> None:
    """Expert 1 was used twice, so it is of class 1; it goes once it is twice as old as expert 2."""
    policy = ClassLRU(*SHAPE)
    used(policy, (1,), (1,), (), (), (2,))
    assert order(policy.values, 1, 2) == [1, 2], "4 / 2 steps against 1"
    used(policy, (), (), ())
    assert order(policy.values, 1, 2) == [2, 1], "7 / 2 steps against 4"


def test_class_lru_forgets_half_of_the_uses_in_128_steps() -> None:
    policy = ClassLRU(*SHAPE)
    used(policy, (1,), *[()] * 127, (1,))
    assert policy._next_crf[1] == pytest.approx(1.5)
    used(policy, *[()] * 255, (1,))
    assert policy._next_crf[1] == pytest.approx(1 + 1.5 / 4)
    assert policy.values[1] == pytest.approx(1 / KEYS - 1), "of class 0 again"


@given(st.lists(st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=3), max_size=60))
def test_class_lru_evicts_what_lists_by_class_would(steps: list[set[int]]) -> None:
    """Literally: a list a class, the head of each by age / 2 ** class."""
    policy = ClassLRU(*SHAPE)
    crf: dict[int, float] = defaultdict(float)
    last: dict[int, float] = {}
    lists: dict[int, list[int]] = defaultdict(list)
    for number, experts in enumerate(steps, 1):
        used(policy, tuple(sorted(experts)))
        for expert in sorted(experts):
            now = number + expert / KEYS
            crf[expert] = 1 + crf[expert] * 0.5 ** ((now - last.get(expert, 0.0)) / 128)
            for held in lists.values():
                if expert in held:
                    held.remove(expert)
            lists[round(float(np.log2(crf[expert])))].append(expert)
            last[expert] = now
        heads = [(held[0], level) for level, held in lists.items() if held]
        if heads:
            ages = {head: (number + 1 - last[head]) / 2**level for head, level in heads}
            victim = min(last, key=lambda expert: policy.values[expert])
            assert ages.get(victim, -1.0) == pytest.approx(max(ages.values()))


# ---------------------------------------------------------------------- LFRU


def test_lfru_weighs_uses_against_the_age_on_the_layers_own_clock() -> None:
    policy = LFRU(*SHAPE)
    used(policy, (1,), (1,), (1,), (2,), ())
    assert policy.values[1] == pytest.approx(3 / 2) and policy.values[2] == pytest.approx(1)
    policy.touch(1, ids(0, 1, 2, 3))
    policy.begin_step(None)
    assert policy.values[1] == pytest.approx(3 / 2), "another layer's clock"
    used(policy, (3,), (4,), (3,), ())
    assert order(policy.values, 1, 2, 3, 4) == [2, 4, 1, 3]


# ---------------------------------------------------------------------- the hot set


def test_the_hot_set_stays_whatever_is_used() -> None:
    policy = HotSet(*SHAPE, calls=[(0, ids(1, 2)), (0, ids(2)), (1, ids(0))])
    before = policy.values.copy()
    for _ in range(5):
        policy.touch(0, ids(5))
    assert np.array_equal(policy.values, before)
    assert order(policy.values, 1, 2, 5) == [5, 1, 2]


def test_a_hot_set_with_bypass_is_pinned_for_good() -> None:
    policy = HotSet(*SHAPE, calls=[(0, ids(1, 2)), (0, ids(1, 2))])
    simulation = BypassSimulation(policy, *SHAPE, 2)
    for expert in (1, 2, 4, 5, 1, 2):
        simulation.step(None, [(0, ids(expert))])
    assert simulation.loads == 4, "1 and 2 once each, and 4 and 5 pass through"


# ---------------------------------------------------------------------- on a device


@pytest.mark.parametrize("name", [n for n, p in POLICIES.items() if p.rule is DeviceRule.STAMP])
@given(calls=calls_of())
def test_a_stamped_policys_table_says_what_a_use_makes_of_each_value(
    name: str, calls: Calls
) -> None:
    policy = make_policy(name, calls)
    for layer, experts in calls:
        policy.begin_step(None)
        table = policy.table()
        assert table is not None
        now, stamped = table
        assert np.array_equal(now, policy.values)
        policy.touch(layer, experts)
        now[layer * NUM_EXPERTS + experts] = stamped[layer * NUM_EXPERTS + experts]
        np.testing.assert_allclose(policy.values, now, rtol=1e-12)


# ---------------------------------------------------------------------- caches of their own


def served(cache: QueueCache, *experts: int) -> list[int]:
    """Calls of layer 0, an expert each; the ones that had to be loaded."""
    return [expert for expert in experts if cache.request(0, ids(expert))]


@pytest.mark.parametrize("name", QUEUE_NAMES)
@given(calls=calls_of(), num_slots=st.integers(1, KEYS))
def test_a_queue_cache_holds_what_it_just_served_and_never_more_than_its_slots(
    name: str, calls: Calls, num_slots: int
) -> None:
    cache = QUEUE_CACHES[name](*SHAPE, num_slots)
    own = num_slots // LAYERS if name == LayerLFRU.name else num_slots
    for layer, experts in calls:
        before = cache.residents()
        keys = {layer * NUM_EXPERTS + int(expert) for expert in experts}
        assert cache.request(layer, experts) == len(keys - before)
        assert len(cache.residents()) <= num_slots
        if len(keys) <= own:
            assert keys <= cache.residents()


@pytest.mark.parametrize("name", QUEUE_NAMES)
@given(calls=calls_of(), num_slots=st.integers(1, KEYS))
def test_no_queue_cache_ever_loads_less_than_belady_with_bypass(
    name: str, calls: Calls, num_slots: int
) -> None:
    optimum = BypassSimulation(Belady(*SHAPE, calls=calls), *SHAPE, num_slots)
    simulation = QueueSimulation(QUEUE_CACHES[name](*SHAPE, num_slots))
    for call in calls:
        optimum.step(None, [call])
        simulation.step(None, [call])
    assert optimum.loads <= simulation.loads
    assert simulation.requests == sum(len(experts) for _, experts in calls)


@pytest.mark.parametrize("name", FREE_RULES)
def test_every_free_rule_loads_each_expert_once_where_all_fit(name: str) -> None:
    calls = [(layer, np.arange(NUM_EXPERTS)) for _ in range(3) for layer in range(LAYERS)]
    simulation = (
        QueueSimulation(QUEUE_CACHES[name](*SHAPE, KEYS))
        if name in QUEUE_CACHES
        else Simulation(POLICIES[name](*SHAPE), *SHAPE, KEYS)
    )
    simulation.step(None, calls)
    assert simulation.loads == KEYS


def test_arc_protects_what_was_used_again_from_a_scan() -> None:
    cache = ARC(*SHAPE, 3)
    served(cache, 0, 1, 0, 1)
    assert served(cache, 2, 3, 4, 5, 0, 1) == [2, 3, 4, 5]


def test_arc_gives_room_to_the_list_whose_ghosts_are_asked_for() -> None:
    cache = ARC(*SHAPE, 2)
    served(cache, 0, 0, 1, 2)
    assert cache.residents() == {0, 2}, "1 was used once, so it went before 0"
    assert cache._target == 0.0
    served(cache, 1)
    assert cache._target == 1.0


def test_s3_fifo_lets_what_is_used_once_pass_and_keeps_what_came_back() -> None:
    cache = S3FIFO(*SHAPE, 4)
    served(cache, 0, 0, 0, 1, 2, 3)
    assert served(cache, 4) == [4]
    assert cache.residents() == {0, 2, 3, 4}, "0 moved on to the main queue; 1 went"
    served(cache, 1)
    assert 1 in cache._main, "it was remembered"


def test_layer_lfru_starts_a_loaded_expert_at_one_use_and_shares_no_slots() -> None:
    cache = LayerLFRU(*SHAPE, 2 * LAYERS)
    served(cache, 0, 0, 0, 1)
    assert served(cache, 2) == [2] and cache.residents() == {0, 2}
    cache.request(1, ids(3, 4))
    assert cache.residents() == {0, 2, NUM_EXPERTS + 3, NUM_EXPERTS + 4}
