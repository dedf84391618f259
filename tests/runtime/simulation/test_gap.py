"""runtime.simulation.gap: the best free rule, and the share of the gap to Belady."""

from __future__ import annotations

import math

import pytest

from runtime.cache.policies import FREE_RULES
from runtime.simulation.gap import best_free_rule, gap_closed


def test_the_best_free_rule_is_the_one_of_the_highest_hit_rate_and_never_a_predictor() -> None:
    rates = {"predicted": 0.9, "belady": 1.0, "hot-set": 0.95, "lru": 0.4, "lfu": 0.6, "arc": 0.5}
    assert best_free_rule(rates) == "lfu"
    assert best_free_rule({"predicted": 0.9}) is None
    assert {"lru", "lfu", "class-lru", "lfru", "arc", "s3-fifo"} <= set(FREE_RULES)


def test_the_gap_closed_is_negative_below_the_floor_and_nan_without_a_gap() -> None:
    assert gap_closed(0.6, 0.5, 0.7) == pytest.approx(0.5)
    assert gap_closed(0.4, 0.5, 0.7) == pytest.approx(-0.5)
    assert math.isnan(gap_closed(0.7, 0.7, 0.7))
