"""prefetch="auto": the faster way is found by the clock, kept, and told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cuda.prefetching import NEEDED, TURN, PrefetchTrial
from runtime.cuda.trial import AGAIN, SETTLING, typical


def play(trial: PrefetchTrial, steps: int, with_it: float, without: float) -> list[bool]:
    """Run steps of the given milliseconds, one of them always under way."""
    ways, flying = [], [trial.next_way()]
    for _ in range(steps):
        flying.append(trial.next_way())
        way = flying.pop(0)
        trial.add(way, (with_it if way else without) / 1e3)
        ways.append(way)
    return ways


@pytest.mark.parametrize(("with_it", "without"), [(9.0, 10.0), (10.0, 9.0)])
def test_the_faster_way_is_kept(with_it: float, without: float) -> None:
    trial = PrefetchTrial()
    assert trial.verdict == "prefetching is being tried"
    tried = play(trial, 4 * NEEDED, with_it, without)
    assert 0.3 < sum(tried[: 2 * NEEDED]) / (2 * NEEDED) < 0.7
    assert trial.choice is (with_it < without)
    assert tried[-1] is trial.choice
    state = "on" if with_it < without else "off"
    assert trial.verdict == (
        f"prefetching is {state}: {with_it:.2f} ms a step with it, {without:.2f} ms without"
    )


def test_a_way_that_gains_nothing_is_left() -> None:
    trial = PrefetchTrial()
    play(trial, 4 * NEEDED, 9.0, 9.0)
    assert trial.choice is False


def test_the_first_steps_after_a_change_do_not_count() -> None:
    trial = PrefetchTrial()
    for _ in range(3 * NEEDED // TURN):
        for way in (False, True):
            for step in range(TURN):
                assert trial.choice is None or trial.choice is True
                spoilt = way and step < SETTLING
                trial.add(way, 1.0 if spoilt else (0.008 if way else 0.009))
    assert trial.verdict == "prefetching is on: 8.00 ms a step with it, 9.00 ms without"


def test_the_question_is_asked_anew() -> None:
    trial = PrefetchTrial()
    play(trial, AGAIN - 1, 9.0, 10.0)
    assert trial.choice is True
    play(trial, 4 * NEEDED, 10.0, 9.0)
    assert trial.choice is False


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=50))
def test_outliers_do_not_decide(seconds: list[float]) -> None:
    ordinary = typical(seconds)
    assert min(seconds) <= ordinary * (1 + 1e-9)
    assert ordinary <= max(seconds) * (1 + 1e-9)
    assert typical([*[1.0] * 9, 1e9]) == 1.0
