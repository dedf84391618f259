"""The expert cache: which expert is in which slot, under every policy and any order of calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from runtime.cache.belady import Calls
from runtime.cache.expert_cache import ExpertCache, lowest
from runtime.cache.policy import Policy
from runtime.cache.rules.reuse import Reuse
from tests.helpers.policies import (
    LAYERS,
    NUM_EXPERTS,
    POLICY_NAMES,
    calls_of,
    make_policy,
    random_forecast,
)

num_slots_all = st.integers(1, LAYERS * NUM_EXPERTS)


def a_cache(policy: Policy, num_slots: int) -> ExpertCache:
    return ExpertCache(LAYERS, NUM_EXPERTS, num_slots, policy)


def residents(cache: ExpertCache) -> set[int]:
    return set(np.flatnonzero(cache.slot_of_key >= 0).tolist())


def keys_of(layer: int, experts: np.ndarray) -> set[int]:
    return set((layer * NUM_EXPERTS + experts).tolist())


def serve(cache: ExpertCache, layer: int, experts: np.ndarray) -> int:
    """Serve one call, checking the slot table after every wave. Returns the number of loads."""
    before, requested = residents(cache), keys_of(layer, experts)
    served: list[int] = []
    missed: set[int] = set()
    for lookup in cache.waves(layer, experts):
        cache.check_integrity()
        keys = layer * NUM_EXPERTS + lookup.experts
        assert np.array_equal(cache.key_of_slot[lookup.slots], keys), "a slot of its own for each"
        assert len(set(lookup.slots.tolist())) == len(keys) <= cache.num_slots
        served += lookup.experts.tolist()
        missed |= set(keys[lookup.missed].tolist())
    assert sorted(served) == experts.tolist(), "each expert is served exactly once"
    assert missed == requested - before, "a hit is exactly what was resident before the call"
    assert residents(cache) <= before | requested, "nothing comes in that nobody asked for"
    return len(missed)


# ---------------------------------------------------------------------- any sequence


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of(max_size=20), num_slots=num_slots_all, data=st.data())
def test_the_books_balance_after_every_operation(
    name: str, calls: Calls, num_slots: int, data: st.DataObject
) -> None:
    policy = make_policy(name, calls)
    cache = a_cache(policy, num_slots)
    cache.check_integrity()
    for number, (layer, experts) in enumerate(calls):
        if data.draw(st.booleans(), label="a new step"):
            policy.begin_step(random_forecast(number))
        serve(cache, layer, experts)
        assert cache.num_resident == len(residents(cache)) <= num_slots
        if data.draw(st.integers(0, 9), label="an error") == 0:
            cache.clear()
            cache.check_integrity()
            assert not residents(cache)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of(max_size=20), num_slots=num_slots_all)
def test_nothing_is_evicted_while_there_is_a_free_slot(
    name: str, calls: Calls, num_slots: int
) -> None:
    cache = a_cache(make_policy(name, calls), num_slots)
    for layer, experts in calls:
        before = cache.num_resident
        lookups = list(cache.waves(layer, experts))
        num_missed = sum(int(lookup.missed.sum()) for lookup in lookups)
        num_evicted = sum(lookup.num_evicted for lookup in lookups)
        assert num_evicted == max(before + num_missed - num_slots, 0)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of(max_size=20), num_slots=num_slots_all)
def test_the_same_calls_give_the_same_slots(name: str, calls: Calls, num_slots: int) -> None:
    def run() -> list[list[int]]:
        policy = make_policy(name, calls)
        cache = a_cache(policy, num_slots)
        slots = []
        for number, (layer, experts) in enumerate(calls):
            policy.begin_step(random_forecast(number))
            slots += [lookup.slots.tolist() for lookup in cache.waves(layer, experts)]
        return slots

    assert run() == run()


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of(max_size=20))
def test_with_a_slot_for_every_expert_each_is_loaded_once(name: str, calls: Calls) -> None:
    cache = a_cache(make_policy(name, calls), LAYERS * NUM_EXPERTS)
    loads = sum(serve(cache, layer, experts) for layer, experts in calls)
    assert loads == len({key for layer, experts in calls for key in keys_of(layer, experts)})


# ---------------------------------------------------------------------- single rules


class Fixed(Policy):
    """Values that a test sets itself."""

    name = "fixed"

    def touch(self, layer: int, experts: np.ndarray) -> None:
        pass


def fixed_cache(num_slots: int, **values: float) -> ExpertCache:
    """A cache whose expert `e<n>` of layer 0 has the given value; others have 0."""
    policy = Fixed(LAYERS, NUM_EXPERTS)
    for name, value in values.items():
        policy.values[int(name[1:])] = value
    return a_cache(policy, num_slots)


def call(cache: ExpertCache, *experts: int) -> list[list[int]]:
    """The experts missed in each wave."""
    lookups = cache.waves(0, np.array(experts, np.int64))
    return [lookup.experts[lookup.missed].tolist() for lookup in lookups]


def test_the_resident_of_lowest_value_goes() -> None:
    cache = fixed_cache(3, e0=5, e1=2, e2=9, e3=1)
    call(cache, 0, 1, 2)
    assert call(cache, 3) == [[3]]
    assert residents(cache) == {0, 2, 3}


def test_equal_values_leave_in_the_order_of_slots() -> None:
    cache = fixed_cache(3)
    call(cache, 4, 5, 6)
    slots = cache.slot_of_key[[4, 5, 6]]
    call(cache, 7)
    assert cache.slot_of_key[7] == slots.min()


def test_an_expert_of_the_same_wave_stays_however_little_it_is_worth() -> None:
    cache = fixed_cache(3, e0=-9, e1=8, e2=7, e3=-9)
    call(cache, 0, 1, 2)
    assert call(cache, 0, 3) == [[3]]
    assert residents(cache) == {0, 1, 3}


def test_a_call_wider_than_the_slots_runs_in_waves_with_the_residents_first() -> None:
    cache = fixed_cache(3)
    call(cache, 5, 6)
    waves = [lookup.experts.tolist() for lookup in cache.waves(0, np.arange(8))]
    assert waves == [[5, 6, 0], [1, 2, 3], [4, 7]]


def test_a_call_as_wide_as_the_slots_is_one_wave() -> None:
    cache = fixed_cache(4)
    assert call(cache, 0, 1, 2, 3) == [[0, 1, 2, 3]]
    assert call(cache, 0, 1, 2, 3) == [[]]


def test_experts_of_one_number_in_two_layers_are_two_experts() -> None:
    cache = fixed_cache(4)
    call(cache, 3)
    lookup = next(iter(cache.waves(1, np.array([3]))))
    assert lookup.missed.tolist() == [True]
    assert residents(cache) == {3, NUM_EXPERTS + 3}


def test_a_cleared_cache_has_lost_everything_and_goes_on() -> None:
    cache = fixed_cache(3)
    call(cache, 0, 1, 2)
    cache.clear()
    assert cache.num_resident == 0
    assert call(cache, 0, 1, 2) == [[0, 1, 2]]
    cache.check_integrity()


@given(
    st.lists(st.sampled_from([-np.inf, -3.0, 0.0, 1.0, 2.5]), min_size=1, max_size=20),
    st.data(),
)
def test_the_lowest_values_are_chosen_and_ties_by_index(
    values: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(values)))
    chosen = lowest(np.array(values), count)
    assert sorted(chosen.tolist()) == sorted(np.argsort(values, kind="stable")[:count].tolist())


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: cache.slot_of_key.__setitem__(9, cache.slot_of_key[0]),
        lambda cache: cache.key_of_slot.__setitem__(cache.slot_of_key[0], 9),
        lambda cache: cache.slot_of_key.__setitem__(0, -1),
        lambda cache: cache._free.pop(),
        lambda cache: cache._free.append(cache._free[0]),
        lambda cache: cache._free.append(int(cache.slot_of_key[0])),
    ],
)
def test_check_integrity_notices_a_damaged_slot_table(
    damage: Callable[[ExpertCache], None],
) -> None:
    cache = fixed_cache(6)
    call(cache, 0, 1, 2)
    cache.check_integrity()
    damage(cache)
    with pytest.raises(AssertionError):
        cache.check_integrity()


# ---------------------------------------------------------------------- ranges


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(calls=calls_of(), span=st.integers(1, NUM_EXPERTS), num_slots=num_slots_all)
def test_ranges_serve_each_expert_once_and_one_range_is_one_wave(
    name: str, calls: Calls, span: int, num_slots: int
) -> None:
    assume(num_slots >= span)
    cache = a_cache(make_policy(name, calls), num_slots)
    waves = a_cache(make_policy(name, calls), num_slots)
    for number, (layer, experts) in enumerate(calls):
        cache.policy.begin_step(random_forecast(number))
        waves.policy.begin_step(random_forecast(number))
        before, served = residents(cache), list[int]()
        kept = keys_of(layer, experts) & before
        for lookup in cache.ranges(layer, experts, span):
            cache.check_integrity()
            keys = layer * NUM_EXPERTS + lookup.experts
            assert np.array_equal(cache.key_of_slot[lookup.slots], keys)
            if len(experts) <= num_slots:
                assert set(keys[lookup.missed].tolist()) == set(keys.tolist()) - kept
            served += lookup.experts.tolist()
        assert served == experts.tolist()
        if span == NUM_EXPERTS:
            list(waves.waves(layer, experts))
            assert residents(waves) == residents(cache)


@pytest.mark.parametrize("batch", [8, 32])
def test_reuse_in_ranges_hits_nine_tenths_of_what_is_resident_where_any_expert_is_as_likely(
    batch: int,
) -> None:
    """16 layers of 64 experts, eight a token, a third of them resident: no rule hits more."""
    layers, num_experts, num_slots = 16, 64, 339
    cache = ExpertCache(layers, num_experts, num_slots, Reuse(layers, num_experts))
    random, hits, uses = np.random.default_rng(0), 0, 0
    for step in range(60):
        cache.policy.begin_step(None)
        for layer in range(layers):
            ids_BE = random.random((batch, num_experts)).argsort(1)
            for lookup in cache.ranges(layer, np.unique(ids_BE[:, :8]), 16):
                hits += 0 if step < 30 else int((~lookup.missed).sum())
                uses += 0 if step < 30 else len(lookup.missed)
    assert 0.95 < hits / uses / (num_slots / layers / num_experts) < 1.01
