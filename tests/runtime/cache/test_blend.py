"""runtime.cache.blend: weights follow whoever is right, and each head is scored when it can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.predictor_file.format import FAR
from runtime.cache.blend import LogOddsBlend, to_log_odds

KEYS, HORIZON = 40, 3
SPANS = (0, 1), (1, 2), (1, 1 + HORIZON), (1, 1 + FAR * HORIZON)


def uses(steps: int) -> np.ndarray:
    """Random uses, bool [T, keys]."""
    return np.random.default_rng(3).random((steps, KEYS)) < 0.15


def heads_of(used: np.ndarray, step: int) -> np.ndarray:
    """What the four heads of a step ought to say."""
    padded = np.concatenate([used, np.zeros((FAR * HORIZON + 1, KEYS), bool)])
    return np.stack([padded[step + a : step + b].any(0) for a, b in SPANS])


def losses(advisors: int, told: int, steps: int = 300) -> np.ndarray:
    """Mean log-loss of each head over the last steps, where advisor `told` alone is right."""
    random, used = np.random.default_rng(0), uses(steps)
    blend = LogOddsBlend([0.9, 0.1, 0.0][:advisors], KEYS, horizon=HORIZON)
    total = np.zeros(4)
    for step in range(steps):
        truth = heads_of(used, step)
        advice = [random.random((4, KEYS)).astype(np.float32) for _ in range(advisors)]
        advice[told] = np.where(truth, 0.9, 0.1).astype(np.float32)
        said = blend.mix(advice)
        if step >= steps // 2:
            total -= np.log(np.where(truth, said, 1 - said)).mean(1)
        blend.learn(used[step])
    return total / (steps - steps // 2)


@pytest.mark.parametrize("told", [0, 1, 2])
def test_whichever_advisor_is_right_the_loss_becomes_as_small_as_its_own(told: int) -> None:
    alone = -np.log(0.9)
    assert (losses(3, told) < alone).all()


def test_an_advisor_who_is_always_wrong_is_as_good_as_one_who_is_right() -> None:
    used, blend = uses(200), LogOddsBlend([1.0], KEYS, horizon=HORIZON)
    for step in range(200):
        truth = heads_of(used, step)
        said = blend.mix([np.where(truth, 0.1, 0.9).astype(np.float32)])
        blend.learn(used[step])
    assert (said[:, truth.all(0)] > 0.5).all()
    assert (said[0][~truth[0]] < 0.5).all()


def test_a_head_learns_nothing_before_its_steps_have_run() -> None:
    used, blend = uses(40), LogOddsBlend([1.0], KEYS, horizon=HORIZON)
    advice = np.full((4, KEYS), 0.4, np.float32)
    first_change: dict[int, int] = {}
    for step in range(FAR * HORIZON + 2):
        said = blend.mix([advice])
        for head in range(4):
            if not np.allclose(said[head], 0.4):
                first_change.setdefault(head, step)
        blend.learn(used[step])
    assert first_change == {0: 1, 1: 2, 2: HORIZON + 1, 3: FAR * HORIZON + 1}


def test_before_anything_is_known_the_advice_is_mixed_by_the_weights_to_begin_with() -> None:
    blend = LogOddsBlend([1.0, 0.0], KEYS, horizon=HORIZON)
    sure, other = np.full((4, KEYS), 0.8, np.float32), np.full(KEYS, 0.1, np.float32)
    np.testing.assert_allclose(blend.mix([sure], common=[other]), 0.8, rtol=1e-5)


def test_an_expert_whose_use_nobody_foresees_gets_a_prior_of_its_own() -> None:
    blend = LogOddsBlend([1.0], KEYS, horizon=HORIZON)
    used = np.arange(KEYS) == 7
    for _ in range(400):
        said = blend.mix([np.full((4, KEYS), 0.1, np.float32)])
        blend.learn(used)
    assert (said[:, 7] > 3 * np.delete(said, 7, axis=1).max(1)).all()


probability = st.sampled_from([0.0, 1.0, 0.5, 1e-38, float("nan"), float("inf"), -1.0])


@given(st.lists(st.tuples(probability, probability, st.booleans()), min_size=1, max_size=80))
def test_whatever_is_advised_the_blend_says_probabilities(
    steps: list[tuple[float, float, bool]],
) -> None:
    blend = LogOddsBlend([0.7, 0.3], KEYS, horizon=HORIZON)
    for first, second, is_used in steps:
        advice, common = np.full((4, KEYS), first, np.float32), np.full(KEYS, second, np.float32)
        said = blend.mix([advice], common=[common])
        assert ((said > 0) & (said < 1)).all()
        blend.learn(np.arange(KEYS) % 2 == is_used)


def test_log_odds_are_bounded_and_take_what_is_not_a_number_for_unlikely() -> None:
    odds = to_log_odds(np.array([0.0, np.nan, 0.5, 1.0], np.float32))
    assert np.isfinite(odds).all()
    assert odds[0] == odds[1] == pytest.approx(-odds[3], rel=1e-3)
    assert odds[2] == 0
