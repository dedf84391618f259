"""runtime.cache.policies: one contract for every policy, the order of each, and the optimum."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.cache.belady import Belady, Calls
from runtime.cache.belady import link_next_uses as link
from runtime.cache.expert_cache import ExpertCache
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LFU, LRU, POLICIES
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.reuse import Reuse
from runtime.simulation.replay import BypassSimulation, Simulation
from tests.helpers.policies import (
    HORIZON,
    LAYERS,
    NUM_EXPERTS,
    POLICY_NAMES,
    calls_of,
    make_policy,
    random_forecast,
)

SHAPE = LAYERS, NUM_EXPERTS
OTHERS = [name for name in POLICY_NAMES if name != Belady.name]
num_slots_all = st.integers(1, LAYERS * NUM_EXPERTS)


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, np.int64)


def order(values: np.ndarray, *keys: int) -> list[int]:
    """The keys from the first to be evicted to the last."""
    return sorted(keys, key=lambda key: (values[key], key))


# ---------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(
    uses=st.lists(
        st.lists(st.booleans(), min_size=LAYERS * NUM_EXPERTS, max_size=LAYERS * NUM_EXPERTS),
        max_size=4,
    )
)
def test_a_whole_step_is_touched_as_its_layers_one_by_one(
    name: str, uses: list[list[bool]]
) -> None:
    steps = [np.array(used).reshape(SHAPE) for used in uses]
    calls = [
        (layer, np.flatnonzero(used_E)) for used_LE in steps for layer, used_E in enumerate(used_LE)
    ]
    whole, single = make_policy(name, calls), make_policy(name, calls)
    for number, used_LE in enumerate(steps):
        for policy in (whole, single):
            policy.begin_step(random_forecast(number) if number % 3 else None)
        whole.touch_layers(used_LE)
        for layer, used_E in enumerate(used_LE):
            single.touch(layer, np.flatnonzero(used_E))
        assert np.array_equal(whole.values, single.values)
        assert whole.clock == single.clock
        for one, other in zip(whole.device_state()[1] or (), single.device_state()[1] or (),
                              strict=True):  # fmt: skip
            assert np.array_equal(one, other)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of())
def test_every_expert_always_has_a_value_that_can_be_compared(name: str, calls: Calls) -> None:
    policy = make_policy(name, calls)
    for number, (layer, experts) in enumerate(calls):
        policy.begin_step(random_forecast(number) if number % 3 else None)
        policy.touch(layer, experts)
        assert policy.values.shape == (LAYERS * NUM_EXPERTS,)
        assert policy.values.dtype == np.float64
        assert (policy.values < np.inf).all(), "the cache marks what must stay with infinity"


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of())
def test_a_call_changes_no_other_layers_values_and_not_its_arguments(
    name: str, calls: Calls
) -> None:
    policy = make_policy(name, calls)
    for number, (layer, experts) in enumerate(calls):
        policy.begin_step(random_forecast(number))
        before, given_experts = policy.values.reshape(SHAPE).copy(), experts.copy()
        policy.touch(layer, experts)
        others = np.arange(LAYERS) != layer
        assert np.array_equal(policy.values.reshape(SHAPE)[others], before[others])
        assert np.array_equal(experts, given_experts)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of())
def test_two_policies_that_saw_the_same_have_the_same_values(name: str, calls: Calls) -> None:
    one, other = make_policy(name, calls), make_policy(name, calls)
    for number, (layer, experts) in enumerate(calls):
        for policy in (one, other):
            policy.begin_step(random_forecast(number))
            policy.touch(layer, experts)
    assert np.array_equal(one.values, other.values)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_policy_goes_by_its_name(name: str) -> None:
    assert make_policy(name, []).name == name
    assert POLICIES[name].needs_forecast == (name == "predicted")


# ---------------------------------------------------------------------- LRU


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = LRU(*SHAPE)
    for layer, expert in ((0, 3), (1, 2), (0, 1), (0, 3)):
        policy.touch(layer, ids(expert))
    assert order(policy.values, 3, 8, 1) == [8, 1, 3]


def test_lru_takes_the_experts_of_a_call_for_older_by_lower_id() -> None:
    policy = LRU(*SHAPE)
    policy.touch(0, ids(1, 3, 4))
    policy.touch(1, ids(0))
    assert order(policy.values, 4, 6, 3, 1) == [1, 3, 4, 6]


# ---------------------------------------------------------------------- LFU


def test_lfu_evicts_what_was_used_least_often() -> None:
    policy = LFU(*SHAPE)
    for experts in (ids(0, 1, 2), ids(0, 1), ids(0)):
        policy.touch(0, experts)
    assert order(policy.values, 0, 1, 2, 3) == [3, 2, 1, 0]


def test_lfu_forgets_old_uses_by_a_factor_a_step() -> None:
    policy = LFU(*SHAPE)
    uses = {0: [0, 1, 2], 1: [70]}
    for step in range(80):
        policy.begin_step(None)
        for expert, steps in uses.items():
            if step in steps:
                policy.touch(0, ids(expert))
    expected = [sum(LFU.fade ** (79 - step) for step in uses[expert]) for expert in (0, 1)]
    np.testing.assert_allclose(policy.values[:2], expected)
    assert order(policy.values, 0, 1) == [0, 1], "three old uses are worth less than a recent one"


# ---------------------------------------------------------------------- reuse


def test_reuse_prefers_what_was_used_just_now_and_what_is_used_often() -> None:
    policy = Reuse(*SHAPE)
    for step in range(40):
        policy.begin_step(None)
        policy.touch(0, ids(0) if step % 2 else ids(0, 1))
    policy.begin_step(None)
    policy.touch(0, ids(2))
    assert order(policy.values, 0, 1, 2, 3) == [3, 2, 1, 0]


def test_reuse_evicts_the_layers_that_ran_before_those_that_come() -> None:
    policy = Reuse(*SHAPE)
    for _ in range(3):
        policy.begin_step(None)
        for layer in range(LAYERS):
            policy.touch(layer, np.arange(NUM_EXPERTS))
    policy.begin_step(None)
    policy.touch(0, np.arange(NUM_EXPERTS))
    policy.touch(1, np.arange(NUM_EXPERTS))
    first, second, third = policy.values.reshape(SHAPE)
    assert second.max() < first.min() < third.min()


@pytest.mark.parametrize(("name", "least"), [("reuse", 0.9), ("lru", 0.0)])
def test_passes_over_all_experts_hit_what_fits_beside_the_running_layer(
    name: str, least: float
) -> None:
    """Of 12 layers of 6 experts half fit; a layer's 6 are needed at once."""
    num_layers, slots = 12, 36
    cache = ExpertCache(num_layers, NUM_EXPERTS, slots, POLICIES[name](num_layers, NUM_EXPERTS))
    hits = 0
    for step in range(20):
        cache.policy.begin_step(None)
        for layer in range(num_layers):
            (lookup,) = cache.waves(layer, np.arange(NUM_EXPERTS))
            hits += 0 if step < 10 else int((~lookup.missed).sum())
    possible = (slots - NUM_EXPERTS) / (num_layers * NUM_EXPERTS - NUM_EXPERTS)
    share = hits / (10 * num_layers * NUM_EXPERTS)
    assert share >= least * possible
    assert name != "lru" or share == 0


# ---------------------------------------------------------------------- predicted reuse


def forecast(**heads: dict[int, float]) -> Forecast:
    """`this`, `next`, `horizon`, `far` give probabilities by key; all others are 0."""
    planes = np.zeros((4, LAYERS * NUM_EXPERTS), np.float32)
    for plane, name in zip(planes, ("this", "next", "horizon", "far"), strict=True):
        for key, probability in heads.get(name, {}).items():
            plane[key] = probability
    return Forecast(*planes.reshape(4, *SHAPE))


def predicted(prediction: Forecast | None) -> PredictedReuse:
    policy = PredictedReuse(*SHAPE, horizon=HORIZON)
    policy.begin_step(prediction)
    return policy


def test_predicted_keeps_what_this_step_needs_over_the_next_step_over_later_over_never() -> None:
    policy = predicted(forecast(this={1: 1.0}, next={2: 1.0}, horizon={3: 1.0}, far={4: 1.0}))
    assert order(policy.values, 1, 2, 3, 4, 5) == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("head", ["this", "next", "horizon", "far"])
def test_predicted_keeps_the_likelier_over_the_less_likely(head: str) -> None:
    policy = predicted(forecast(**{head: {1: 0.9, 2: 0.1, 3: 0.5}}))
    assert order(policy.values, 1, 2, 3) == [2, 3, 1]


def test_predicted_keeps_what_an_earlier_layer_needs_over_a_later_one() -> None:
    first, last = 1, (LAYERS - 1) * NUM_EXPERTS + 1
    policy = predicted(forecast(this={first: 0.7, last: 0.7}))
    assert order(policy.values, first, last) == [last, first]


def test_predicted_drops_what_a_layer_that_ran_needs_no_more() -> None:
    policy = predicted(forecast(this={1: 1.0, 7: 1.0}, next={2: 1.0}))
    policy.touch(0, ids(1))
    assert order(policy.values, 1, 2, 7) == [1, 2, 7]


def test_predicted_falls_back_on_what_it_has_seen_where_there_is_no_forecast() -> None:
    policy = predicted(None)
    for _ in range(5):
        policy.touch(0, ids(1))
        policy.begin_step(None)
    policy.touch(0, ids(2))
    policy.begin_step(None)
    assert order(policy.values, 1, 2, 3) == [3, 2, 1]


# ---------------------------------------------------------------------- Belady


def test_belady_evicts_what_is_used_furthest_in_the_future_and_first_what_never_is() -> None:
    calls = [(0, ids(0, 1, 2, 3)), (0, ids(2)), (1, ids(5)), (0, ids(0)), (0, ids(3))]
    policy = Belady(*SHAPE, calls=calls)
    policy.touch(*calls[0])
    assert order(policy.values, 0, 1, 2, 3) == [1, 3, 0, 2]
    policy.touch(*calls[1])
    assert order(policy.values, 0, 2, 3) == [2, 3, 0]


@given(calls_of(min_experts=0))
def test_next_uses_are_what_a_search_finds(calls: Calls) -> None:
    for position, (found, (layer, experts)) in enumerate(
        zip(link(calls, *SHAPE), calls, strict=True)
    ):
        later = [
            [
                p
                for p in range(position + 1, len(calls))
                if calls[p][0] == layer and e in calls[p][1]
            ]
            for e in experts
        ]
        assert found.tolist() == [-min(uses) if uses else -np.inf for uses in later]


def test_belady_refuses_a_call_that_was_not_recorded() -> None:
    policy = Belady(*SHAPE, calls=[(0, ids(1)), (1, ids(2))])
    policy.touch(0, ids(1))
    with pytest.raises(
        ValueError, match=r"call 1 differs .* layer 1 uses \[3\].* layer 1 with \[2"
    ):
        policy.touch(1, ids(3))


def test_belady_refuses_to_go_on_after_the_recording() -> None:
    policy = Belady(*SHAPE, calls=[(0, ids(1))])
    policy.touch(0, ids(1))
    with pytest.raises(ValueError, match="recorded trace ends after 1 expert calls"):
        policy.touch(0, ids(1))


# ---------------------------------------------------------------------- the optimum


def loads(name: str, calls: Calls, num_slots: int) -> int:
    simulation = Simulation(make_policy(name, calls), *SHAPE, num_slots)
    for number, call in enumerate(calls):
        simulation.step(random_forecast(number), [call])
    return simulation.loads


def bypass_loads(calls: Calls, num_slots: int) -> int:
    simulation = BypassSimulation(make_policy("belady", calls), *SHAPE, num_slots)
    for call in calls:
        simulation.step(None, [call])
    return simulation.loads


def fewest_loads(calls: Calls, num_slots: int, *, bypass: bool) -> int:
    """By trying everything: the cost of every possible content of the cache after each call."""
    cost = {frozenset[int](): 0}
    for layer, experts in calls:
        requested = frozenset((layer * NUM_EXPERTS + experts).tolist())
        after: dict[frozenset[int], int] = {}
        for content, spent in cost.items():
            spent += len(requested - content)
            must = frozenset() if bypass else requested
            may = sorted((content | requested) - must)
            for kept in combinations(may, min(num_slots - len(must), len(may))):
                after[must.union(kept)] = min(spent, after.get(must.union(kept), spent))
        cost = after
    return min(cost.values())


def wider_than(num_slots: int, calls: Calls) -> bool:
    return any(len(experts) > num_slots for _, experts in calls)


small = calls_of(max_experts=3, max_size=9)


@settings(max_examples=60)
@given(small, st.integers(1, 4))
def test_belady_is_the_optimum_where_every_call_fits_the_slots(
    calls: Calls, num_slots: int
) -> None:
    assume(not wider_than(num_slots, calls))
    assert loads("belady", calls, num_slots) == fewest_loads(calls, num_slots, bypass=False)


@settings(max_examples=60)
@given(small, st.integers(1, 4))
def test_belady_with_bypass_is_the_optimum_of_all_calls(calls: Calls, num_slots: int) -> None:
    assert bypass_loads(calls, num_slots) == fewest_loads(calls, num_slots, bypass=True)


@pytest.mark.parametrize("name", OTHERS)
@given(calls=calls_of(max_experts=1), num_slots=num_slots_all)
def test_belady_never_loads_more_than_another_policy_on_calls_of_one_expert(
    name: str, calls: Calls, num_slots: int
) -> None:
    assert loads("belady", calls, num_slots) <= loads(name, calls, num_slots)


@pytest.mark.parametrize("name", OTHERS)
@given(calls=calls_of(), num_slots=st.integers(NUM_EXPERTS, LAYERS * NUM_EXPERTS))
def test_belady_never_loads_more_than_another_policy_on_calls_that_fit_the_slots(
    name: str, calls: Calls, num_slots: int
) -> None:
    assert loads("belady", calls, num_slots) <= loads(name, calls, num_slots)


def test_bypass_saves_a_load_where_a_call_is_wider_than_the_slots() -> None:
    """The last wave of such a call stays, whatever comes next; bypass keeps any of its experts."""
    calls = [(0, ids(0, 1, 2)), (0, ids(0))]
    assert (loads("belady", calls, 1), bypass_loads(calls, 1)) == (4, 3)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of(), num_slots=num_slots_all)
def test_no_policy_ever_loads_less_than_belady_with_bypass(
    name: str, calls: Calls, num_slots: int
) -> None:
    assert bypass_loads(calls, num_slots) <= loads(name, calls, num_slots)
