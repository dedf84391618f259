"""runtime.cache.predicted_reuse: never worse than the free rules, and as good as its forecast."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.predictor_file.format import FAR
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LFU, LRU
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.simulation.replay import Simulation

LAYERS, EXPERTS, TOP_K, HORIZON = 3, 24, 3, 4
SHAPE = LAYERS, EXPERTS
STEPS = 1600
RESIDENCY = 0.125, 0.25, 0.5
BELOW = 0.003
"""Hit rate that predicted reuse may lose to the best free rule."""

Heads = np.ndarray
"""Probabilities of the four heads, float32 [4, L, E]."""


@cache
def routes() -> np.ndarray:
    """Routes [T, L, K] of a text that changes its topic, and often repeats its last experts."""
    random = np.random.default_rng(7)
    popularity = 1 / np.arange(1, EXPERTS + 1) ** 0.8
    routes_TLK = np.empty((STEPS, LAYERS, TOP_K), np.int64)
    for step in range(STEPS):
        if step % 240 == 0:
            topic = [random.permutation(EXPERTS) for _ in range(LAYERS)]
        for layer in range(LAYERS):
            weights = popularity[topic[layer]].copy()
            if step:
                weights[routes_TLK[step - 1, layer]] *= 1.5
            drawn = random.choice(EXPERTS, TOP_K, replace=False, p=weights / weights.sum())
            routes_TLK[step, layer] = np.sort(drawn)
    return routes_TLK


@cache
def truth() -> np.ndarray:
    """What the four heads ought to say, bool [T, 4, L, E]."""
    used = np.zeros((STEPS + FAR * HORIZON + 1, *SHAPE), bool)
    np.put_along_axis(used[:STEPS], routes(), True, axis=-1)
    spans = (0, 1), (1, 2), (1, 1 + HORIZON), (1, 1 + FAR * HORIZON)
    heads = [np.any([used[step : step + STEPS] for step in range(*span)], axis=0) for span in spans]
    return np.stack(heads, axis=1)


def hit_rates(policy: Callable[[], Policy], heads_T: list[Forecast | None]) -> np.ndarray:
    """Hit rates at each cache size."""
    rates = []
    for share in RESIDENCY:
        simulation = Simulation(policy(), *SHAPE, int(share * LAYERS * EXPERTS))
        for forecast, routes_LK in zip(heads_T, routes(), strict=True):
            simulation.step(forecast, list(enumerate(routes_LK)))
        rates.append(1 - simulation.loads / simulation.requests)
    return np.array(rates)


@cache
def best_free_rule() -> np.ndarray:
    nothing: list[Forecast | None] = [None] * STEPS
    lru, lfu = (hit_rates(partial(rule, *SHAPE), nothing) for rule in (LRU, LFU))
    return np.maximum(lru, lfu)


def predicted_hit_rates(heads: Heads) -> np.ndarray:
    """Hit rates of predicted reuse under these heads, [T, 4, L, E]."""
    forecasts: list[Forecast | None] = [Forecast(*planes) for planes in heads.astype(np.float32)]
    return hit_rates(lambda: PredictedReuse(*SHAPE, horizon=HORIZON), forecasts)


def noisy(error: float) -> Heads:
    """The truth, seen through noise in log-odds, and calibrated by hand."""
    random = np.random.default_rng(1)
    odds = (2.0 * truth() - 1.0) * error + random.normal(0, 1.5, truth().shape)
    return 1 / (1 + np.exp(-odds))


ADVERSARIES: dict[str, Callable[[], Heads]] = {
    "random": lambda: np.random.default_rng(2).random(truth().shape),
    "inverted": lambda: np.where(truth(), 0.01, 0.99),
    "sure_and_wrong": lambda: np.where(truth(), 0.0, 1.0),
    "constant": lambda: np.full(truth().shape, 0.5),
    "never": lambda: np.zeros(truth().shape),
    "stuck": lambda: np.repeat(truth()[:1].astype(float), STEPS, axis=0),
    "late": lambda: np.roll(truth(), 25, axis=0) * 0.98 + 0.01,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_a_forecast_that_misleads_costs_nothing_against_the_best_free_rule(adversary: str) -> None:
    lost = best_free_rule() - predicted_hit_rates(ADVERSARIES[adversary]())
    assert (lost <= BELOW).all(), lost


def test_a_forecast_that_turns_bad_costs_little_while_that_shows() -> None:
    heads = np.where(np.arange(STEPS)[:, None, None, None] < STEPS // 2, noisy(2.0), 1 - noisy(2.0))
    assert (best_free_rule() - predicted_hit_rates(heads) <= BELOW).all()


def test_without_a_forecast_it_is_as_good_as_the_best_free_rule() -> None:
    rates = hit_rates(lambda: PredictedReuse(*SHAPE, horizon=HORIZON), [None] * STEPS)
    assert (best_free_rule() - rates <= BELOW).all(), best_free_rule() - rates


class Trusting(PredictedReuse):
    """Takes the forecast at its word."""

    def _blended(self, forecast: Forecast | None, seen: np.ndarray) -> Forecast:
        assert forecast is not None
        return forecast


@pytest.mark.sampled(3)
@pytest.mark.parametrize("quality", [1.5, 3.0, 6.0])
def test_a_good_forecast_keeps_its_gain(quality: float) -> None:
    heads = noisy(quality)
    forecasts: list[Forecast | None] = [Forecast(*planes) for planes in heads.astype(np.float32)]
    trusted = hit_rates(lambda: Trusting(*SHAPE, horizon=HORIZON), forecasts)
    blended = predicted_hit_rates(heads)
    assert (trusted > best_free_rule() + 0.02).all(), "the forecast is worth something"
    assert (blended >= trusted - BELOW).all(), blended - trusted


@pytest.mark.parametrize("by", ["the same tokens", "tokens alike"])
def test_what_is_remembered_helps_a_forecast_that_does_not(by: str) -> None:
    nothing = np.full((4, *SHAPE), 0.1, np.float32)

    def advice(heads: np.ndarray) -> np.ndarray:
        return np.stack([heads, nothing] if by == "the same tokens" else [nothing, heads])

    useless, remembered = np.full((4, *SHAPE), 0.5, np.float32), noisy(3.0).astype(np.float32)
    forecasts: list[Forecast | None] = [
        Forecast(*useless)._replace(remembered=advice(heads)) for heads in remembered
    ]
    rates = hit_rates(lambda: PredictedReuse(*SHAPE, horizon=HORIZON), forecasts)
    assert (rates > best_free_rule() + 0.02).all()


# ---------------------------------------------------------------------- invariants

extreme = st.sampled_from([0.0, 1.0, 1e-30, 1 - 1e-7, 0.5, float("nan"), -1.0, 2.0])


@given(st.lists(st.tuples(extreme, extreme, st.integers(0, EXPERTS - 1)), min_size=1, max_size=60))
def test_whatever_is_forecast_the_values_are_finite_and_the_expectations_probabilities(
    steps: list[tuple[float, float, int]],
) -> None:
    policy = PredictedReuse(*SHAPE, horizon=HORIZON)
    for said, remembered, expert in steps:
        heads = np.full((3, 4, *SHAPE), said, np.float32)
        heads[1:] = remembered
        policy.begin_step(Forecast(*heads[0])._replace(remembered=heads[1:]))
        for plane in policy.expected[:4]:
            assert ((plane > 0) & (plane < 1)).all()
        for layer in range(LAYERS):
            policy.touch(layer, np.array([expert]))
        assert np.isfinite(policy.values).all()


@given(st.integers(0, 1000))
def test_experts_in_another_order_get_the_same_values_in_that_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    order = random.permutation(EXPERTS)
    plain, permuted = (PredictedReuse(*SHAPE, horizon=HORIZON) for _ in range(2))
    for _ in range(12):
        heads = random.random((4, *SHAPE)).astype(np.float32)
        used = random.permutation(EXPERTS)[:TOP_K]
        plain.begin_step(Forecast(*heads))
        permuted.begin_step(Forecast(*heads[:, :, order]))
        for layer in range(LAYERS):
            plain.touch(layer, used)
            permuted.touch(layer, np.flatnonzero(np.isin(order, used)))
    expected = plain.values.reshape(SHAPE)[:, order]
    np.testing.assert_allclose(permuted.values.reshape(SHAPE), expected, rtol=1e-3, atol=1e-5)


def test_a_better_forecast_of_the_same_step_replaces_the_first() -> None:
    random = np.random.default_rng(0)
    first, better = (Forecast(*random.random((4, *SHAPE)).astype(np.float32)) for _ in range(2))
    revised, told = (PredictedReuse(*SHAPE, horizon=HORIZON) for _ in range(2))
    for _ in range(30):
        revised.begin_step(first)
        revised.revise(better)
        told.begin_step(better)
        for policy in (revised, told):
            policy.touch(0, np.array([1, 2]))
    assert np.array_equal(revised.values, told.values)


def test_a_step_that_used_nothing_teaches_nothing() -> None:
    forecast = Forecast(*np.full((4, *SHAPE), 0.3, np.float32))
    policy = PredictedReuse(*SHAPE, horizon=HORIZON)
    policy.begin_step(forecast)
    before = policy.values.copy()
    for _ in range(10):
        policy.begin_step(forecast)
    assert np.array_equal(policy.values, before)


def test_the_routes_of_a_whole_step_count_as_the_touches_of_its_layers() -> None:
    """As captured and served steps tell them: [L, B, K], duplicates and NO_EXPERT among them."""
    random = np.random.default_rng(5)
    layers, experts, heads = 3, 7, 4
    whole, single = (PredictedReuse(layers, experts, horizon=2) for _ in range(2))
    for _ in range(12):
        forecast = Forecast(*random.random((heads, layers, experts), np.float32))
        routes_LBK = random.integers(-1, experts, (layers, 2, 3))
        for policy in (whole, single):
            policy.begin_step(forecast)
        whole.touch_routes(routes_LBK)
        single.touch_routes(list(routes_LBK))  # one layer after the other
        assert np.array_equal(whole.values, single.values)
    for policy in (whole, single):
        policy.begin_step(None)
    assert np.array_equal(whole.values, single.values)
