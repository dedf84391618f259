"""The order of work: bounds that hold for any ordering, and what each ordering chooses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.predictor_file.driver import Past
from routing.predictor_file.reader import open_predictor
from routing.topology import Layer, Stack
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.sequence_forecaster import SequenceForecaster, join
from runtime.serving.request import Request
from runtime.serving.scheduling.bursts import Bursts, StepTimes
from runtime.serving.scheduling.ordering import DomainOracle, Ordering
from runtime.serving.scheduling.paper import Paper, similarity, split
from runtime.serving.scheduling.payoff import Payoff, expected_loads
from runtime.serving.scheduling.predicted import Predicted, cheapest
from runtime.serving.scheduling.scheduler import Scheduler, build_scheduler
from runtime.serving.sequence import ServedSequence
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.serving import SMALL, offloaded, prompts, sequence
from tests.helpers.tiny import tiny_model
from tests.runtime.prediction.test_forecaster import TOPOLOGY

NOTHING = np.ones(0, np.float32)


class Spite(Ordering):
    """Serves the youngest first, and the oldest never if it can."""

    name = "spite"

    def admit(
        self,
        waiting: Sequence[ServedSequence],
        active: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        return list(waiting[::-1][:count])

    def compose(
        self,
        ready: Sequence[ServedSequence],
        chosen: Sequence[ServedSequence],
        count: int,
        missing_K: np.ndarray,
    ) -> list[ServedSequence]:
        return list(ready[::-1][:count])


def make_ready(waiting: ServedSequence, row: int) -> ServedSequence:
    waiting.row = row
    waiting.token_ids.append(0)
    return waiting


def predicted(burst: int = 1, batch: int = 4) -> Predicted:
    return Predicted(lambda: 1.0, burst=burst, batch=batch)


# ---------------------------------------------------------------------- bounds


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    parked=st.integers(0, 6),
    patience=st.integers(0, 6),
    max_skips=st.integers(0, 6),
    arrivals=st.lists(st.integers(0, 4), min_size=20, max_size=60),
    lives=st.lists(st.integers(1, 9), min_size=8, max_size=8),
    priorities=st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
def test_nobody_waits_beyond_the_bounds_however_spiteful_the_ordering(
    batch: int,
    parked: int,
    patience: int,
    max_skips: int,
    arrivals: list[int],
    lives: list[int],
    priorities: list[int],
) -> None:
    options = ServeSettings(
        batch=batch, rows=batch + parked, patience=patience, max_skips=max_skips, lookahead=4
    )
    scheduler = Scheduler(Spite(), options)
    waiting: list[ServedSequence] = []
    active: dict[ServedSequence, int] = {}
    number = 0
    for count in arrivals:
        for _ in range(count):
            waiting.append(sequence(number, priority=priorities[number % 8]))
            number += 1
        for one in waiting[len(waiting) - count :]:
            one.num_waiting_at_arrival = len(waiting)
        free = options.rows - len(active)
        for admitted in scheduler.admit(waiting, list(active), free, NOTHING):
            waiting.remove(admitted)
            active[make_ready(admitted, 0)] = lives[admitted.number % 8]
        chosen = scheduler.compose(list(active), NOTHING)
        assert len(chosen) == min(batch, len(active))
        for run in chosen:
            active[run] -= 1
        active = {run: left for run, left in active.items() if left}
        most = {one: min(patience, one.num_waiting_at_arrival) + options.rows for one in waiting}
        assert all(one.overtaken <= most[one] for one in waiting)
        bound = max_skips + -(-options.rows // batch)
        assert all(one.skipped <= bound for one in active)


def test_the_loop_counts_who_waited_when_a_request_came(tmp_path: Path) -> None:
    with offloaded(tiny_model("olmoe"), tmp_path) as engine:
        loop = ServingLoop(engine, None, ServeSettings(**SMALL | {"scheduler": "fifo"}))
        for number, prompt in enumerate(prompts(1, 5)):
            loop.submit(Request(id=str(number), prompt=prompt, max_tokens=9, ignore_eos=True))
        loop.step()  # admits three
        loop.submit(Request(id="late", prompt=[3], max_tokens=2))
        loop.step()
        crowds = {
            one.request.id: one.num_waiting_at_arrival for one in (*loop.active, *loop.waiting)
        }
        assert crowds == dict.fromkeys("01234", 5) | {"late": 3}


@pytest.mark.parametrize(("batch", "name"), [(1, "predicted"), (8, "predicted"), (32, "fifo")])
def test_where_a_step_uses_nearly_every_expert_order_is_left_alone(batch: int, name: str) -> None:
    layers = tuple(Layer(f"layers.{index}", 64, 8) for index in range(16))
    options = ServeSettings(batch=batch)
    scheduler = build_scheduler(
        options, stack=Stack(name="decoder", layers=layers), seconds_per_load=lambda: 0.0
    )
    assert scheduler.ordering.name == name
    assert (
        build_scheduler(options, stack=None, seconds_per_load=lambda: 0.0).ordering.name == "fifo"
    )


def test_a_higher_priority_is_served_first() -> None:
    scheduler = Scheduler(Spite(), ServeSettings(batch=2, rows=2))
    sequences = [sequence(i, priority=int(i == 1)) for i in range(4)]
    assert [one.number for one in scheduler.admit(sequences, [], 2, NOTHING)] == [1, 3]
    ready = [make_ready(one, 0) for one in sequences]
    assert [one.number for one in scheduler.compose(ready, NOTHING)] == [1, 3]


def test_a_held_back_burst_lets_an_urgent_request_through() -> None:
    use_K = np.full(4, 0.5)
    scheduler = Scheduler(predicted(burst=7, batch=1), ServeSettings(batch=1, rows=8))
    active = [make_ready(sequence(i, use_K), i) for i in range(2)]
    calm, urgent = sequence(2, use_K), sequence(3, use_K, priority=1)
    assert scheduler.admit([calm, urgent], active, 1, np.ones(4, np.float32)) == [urgent]


# ---------------------------------------------------------------------- predicted


def two_kinds(count: int) -> np.ndarray:
    """Rows that alternately use the first and the second half of 8 experts."""
    even = np.arange(count)[:, None] % 2 == 0
    return np.where(even == (np.arange(8) < 4), 0.9, 0.05).astype(np.float32)


def test_a_step_is_composed_of_sequences_that_use_the_same_experts() -> None:
    ready = [make_ready(sequence(i, use_K), i) for i, use_K in enumerate(two_kinds(8))]
    chosen = predicted().compose(ready, [], 4, np.ones(8, np.float32))
    assert len({one.number % 2 for one in chosen}) == 1 and len(chosen) == 4


def test_what_is_resident_costs_nothing() -> None:
    ready = [make_ready(sequence(i, use_K), i) for i, use_K in enumerate(two_kinds(8))]
    missing_K = np.array([1] * 4 + [0] * 4, np.float32)
    chosen = predicted().compose(ready, [], 4, missing_K)
    assert [one.number for one in chosen] == [1, 3, 5, 7]


def test_admission_prefers_what_overlaps_with_the_running() -> None:
    sequences = [sequence(i, use_K) for i, use_K in enumerate(two_kinds(9))]
    active = [make_ready(sequences[8], 0)]
    admitted = predicted().admit(sequences[:8], active, 3, np.ones(8, np.float32))
    assert all(one.number % 2 == 0 for one in admitted)


@pytest.mark.parametrize(("share", "rests"), [(0.9, False), (0.97, True)])
def test_order_rests_at_once_after_a_group_that_still_uses_nearly_all_experts(
    share: float, rests: bool
) -> None:
    ordering = predicted()
    each = 1 - (1 - share) ** (1 / 4)  # four sequences together use this share
    ready = [make_ready(sequence(i, np.full(8, each)), i) for i in range(8)]
    assert len(ordering.compose(ready, [], 4, np.ones(8, np.float32))) == 4
    assert ordering.payoff.resting is rests and ordering.looks_ahead is not rests
    assert ordering.payoff.times_rested == int(rests)


def test_order_tries_again_after_a_rest_and_longer_ones_follow_in_a_row() -> None:
    ordering, steps = predicted(), []
    ready = [make_ready(sequence(i, np.ones(8)), i) for i in range(8)]
    for _ in range(3):
        ordering.compose(ready, [], 4, np.ones(8, np.float32))
        steps.append(0)
        while ordering.payoff.resting:
            ordering.compose(ready, [], 4, np.ones(8, np.float32))
            steps[-1] += 1
    assert steps == [Payoff.REST, 2 * Payoff.REST, 4 * Payoff.REST]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(2, 7), count=st.integers(1, 4))
def test_the_first_choice_is_the_cheapest_and_each_next_adds_least(
    seed: int, rows: int, count: int
) -> None:
    random = np.random.default_rng(seed)
    unused_NK = random.random((rows, 12)).astype(np.float32)
    weight_K = random.random(12).astype(np.float32)
    chosen = cheapest(unused_NK, weight_K, count)
    assert len(set(chosen)) == len(chosen) == min(count, rows)
    for at, best in enumerate(chosen):
        others = set(range(rows)) - set(chosen[:at])
        cost = {i: expected_loads(unused_NK[[*chosen[:at], i]], weight_K) for i in others}
        assert cost[best] <= min(cost.values()) + 1e-4


# ---------------------------------------------------------------------- pay-off


def test_choosing_rests_where_it_costs_more_than_it_saves_and_is_tried_again() -> None:
    payoff = Payoff(lambda: 1e-3)
    for _ in range(Payoff.WINDOW):
        payoff.add(saved_loads=1.0, seconds=2e-3)
    assert payoff.resting
    assert [payoff.rests() for _ in range(Payoff.REST + 1)] == [True] * Payoff.REST + [False]


def choose(payoff: Payoff, *, gained: float) -> None:
    """A window of choices that gain so much for each second they take."""
    for _ in range(Payoff.WINDOW):
        payoff.add(saved_loads=gained, seconds=1.0)


def test_one_window_that_nearly_paid_is_no_reason_to_rest_two_in_a_row_are() -> None:
    payoff = Payoff(lambda: 1.0)
    for gained, rests in ((0.9, False), (1.1, False), (0.9, False), (0.9, True)):
        choose(payoff, gained=gained)
        assert payoff.resting is rests


def test_rests_grow_until_choosing_pays_again() -> None:
    payoff, lengths = Payoff(lambda: 1.0), []
    for gained in (0.1, 0.1, 0.1, 0.1, 0.1, 2.0, 0.1):
        choose(payoff, gained=gained)
        lengths.append(sum(iter(payoff.rests, False)))
    assert lengths == [64, 128, 256, 512, 512, 0, 64]


def test_choosing_goes_on_where_it_pays() -> None:
    payoff = Payoff(lambda: 1e-3)
    for _ in range(5 * Payoff.WINDOW):
        payoff.add(saved_loads=3.0, seconds=2e-3)
        assert not payoff.rests()


def test_with_every_expert_resident_the_scheduler_falls_back_to_fifo(tmp_path: Path) -> None:
    with offloaded(tiny_model("olmoe"), tmp_path, memory=1.0) as engine:
        loop = ServingLoop(
            engine, None, ServeSettings(scheduler="predicted", batch=2, rows=8, context=64)
        )
        for i in range(8):
            loop.submit(Request(prompt=[i + 2], max_tokens=20, ignore_eos=True))
        while not loop.is_idle:
            loop.step()
        ordering = loop.scheduler.ordering
        assert isinstance(ordering, Predicted) and ordering.payoff.times_rested == 1


# ---------------------------------------------------------------------- bursts


@pytest.mark.parametrize(("memory", "foresees"), [(0.5, True), (1.0, False)])
def test_nothing_is_foreseen_where_every_expert_has_a_slot(
    tmp_path: Path, memory: float, foresees: bool
) -> None:
    with offloaded(tiny_model("olmoe"), tmp_path, memory=memory) as engine:
        loop = ServingLoop(engine, None, ServeSettings(batch=2, rows=3, context=24))
        for number, prompt in enumerate(prompts(1, 3)):
            loop.submit(Request(id=str(number), prompt=prompt, max_tokens=3, ignore_eos=True))
        while not loop.is_idle:
            loop.step()
        assert (engine.stats().seconds["predict"] > 0) == foresees
        assert loop.scheduler.ordering.name == ("predicted" if foresees else "fifo")


def test_prompts_wait_for_each_other_and_a_lone_one_for_nobody() -> None:
    bursts = Bursts(3, batch=4, seconds_per_load=lambda: 1.0)
    assert bursts.holds_back(num_waiting=5, num_free=2, num_active=2)
    assert not bursts.holds_back(num_waiting=5, num_free=3, num_active=1)
    assert not bursts.holds_back(num_waiting=1, num_free=1, num_active=3)
    assert not bursts.holds_back(num_waiting=5, num_free=2, num_active=0), "no row would come free"


@pytest.mark.parametrize(("seconds_per_load", "rests"), [(1e-3, False), (1e-5, True)])
def test_bursts_rest_where_empty_places_cost_more_than_shared_loads_save(
    seconds_per_load: float, rests: bool
) -> None:
    bursts = Bursts(2, batch=4, seconds_per_load=lambda: seconds_per_load)
    for num_sequences in (1, 4):
        bursts.times.add(num_sequences, 0.4 + 0.1 * num_sequences)
    unused_NK = np.full((2, 1000), 0.1)  # both use nearly all: 810 loads in common
    for _ in range(Bursts.WINDOW):
        assert bursts.holds_back(num_waiting=9, num_free=1, num_active=3)
        bursts.count(unused_NK, np.ones(1000))
    assert bursts.holds_back(num_waiting=9, num_free=1, num_active=3) is not rests


@settings(max_examples=30, deadline=None)
@given(
    fixed=st.floats(0, 5),
    each=st.floats(0, 5),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=9),
)
def test_the_fixed_part_of_a_step_is_found_once_sizes_differ(
    fixed: float, each: float, sizes: list[int]
) -> None:
    times = StepTimes()
    for size in sizes:
        times.add(size, fixed + each * size)
    expected = fixed if len(set(sizes)) > 1 else 0.0
    assert times.fixed == pytest.approx(expected, abs=1e-6)


def test_without_parked_sequences_too_the_scheduler_falls_back_to_fifo(tmp_path: Path) -> None:
    with offloaded(tiny_model("olmoe"), tmp_path, memory=1.0) as engine:
        loop = ServingLoop(
            engine, None, ServeSettings(scheduler="predicted", batch=2, rows=2, burst=2, context=64)
        )
        for i in range(80):
            loop.submit(Request(prompt=[i + 2], max_tokens=1 + i % 2, ignore_eos=True))
        while not loop.is_idle:
            loop.step()
        ordering = loop.scheduler.ordering
        assert isinstance(ordering, Predicted) and ordering.bursts.payoff.times_rested == 1


def test_while_the_scheduler_rests_no_prompt_is_read_ahead(tmp_path: Path) -> None:
    with offloaded(tiny_model("olmoe"), tmp_path, memory=1.0) as engine:
        loop = ServingLoop(
            engine, None, ServeSettings(scheduler="predicted", batch=2, rows=2, context=64)
        )
        ordering = loop.scheduler.ordering
        assert isinstance(ordering, Predicted)
        for _ in range(Bursts.WINDOW):
            ordering.bursts.payoff.add(0.0, 1.0)
        for i in range(9):
            loop.submit(Request(prompt=[i + 2], max_tokens=3, ignore_eos=True))
        loop.step()
        assert [one.number for one in loop.active] == [0, 1]
        assert all(one.forecast is None for one in loop.waiting)


# ---------------------------------------------------------------------- references


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(2, 17))
def test_the_papers_split_is_equal(seed: int, count: int) -> None:
    routes_NK = np.random.default_rng(seed).random((count, 30)) < 0.3
    first_N = split(similarity(routes_NK))
    assert first_N.sum() == (count + 1) // 2


def test_the_papers_split_finds_two_kinds() -> None:
    kinds = np.array([0, 1, 1, 0, 0, 1])
    routes_NK = np.random.default_rng(0).random((2, 40))[kinds] < 0.3
    first_N = split(similarity(routes_NK))
    assert len(set(kinds[first_N])) == len(set(kinds[~first_N])) == 1


def test_similarity_is_one_minus_the_share_of_differing_bits() -> None:
    routes_NK = np.random.default_rng(0).random((5, 20)) < 0.4
    expected = [[1 - np.mean(a != b) for b in routes_NK] for a in routes_NK]
    np.testing.assert_allclose(similarity(routes_NK), expected, atol=1e-6)


def test_the_papers_scheduler_runs_one_half_and_then_the_other() -> None:
    ready = [make_ready(sequence(i, use_K), i) for i, use_K in enumerate(two_kinds(8))]
    paper = Paper(top_k=4)
    halves = [[one.number for one in paper.compose(ready, [], 4, NOTHING)] for _ in range(2)]
    assert sorted(halves) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_the_domain_oracle_keeps_to_one_domain_while_it_lasts() -> None:
    ready = [make_ready(sequence(i, label="ab"[i % 2]), i) for i in range(6)]
    forecaster = DomainOracle()
    first = forecaster.compose(ready, [], 2, NOTHING)
    assert {one.request.label for one in first} == {"a"}
    left = [one for one in ready if one not in first]
    assert {one.request.label for one in forecaster.compose(left, [], 2, NOTHING)[:1]} == {"a"}
    assert [j.number for j in forecaster.admit(ready[1:], ready[:1], 2, NOTHING)] == [2, 4]


@pytest.mark.parametrize("name", ["paper", "predicted"])
def test_a_scheduler_that_needs_predictions_is_refused_without(name: str) -> None:
    with pytest.raises(ValueError, match="needs predictions"):
        build_scheduler(ServeSettings(scheduler=name), stack=None, seconds_per_load=lambda: 0.0)


# ---------------------------------------------------------------------- prediction


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    steps=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_sequences_side_by_side_are_predicted_as_each_alone(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], steps: int, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "forecast.onnx"
    if not path.exists():
        write_predictor(path, TOPOLOGY, window=6)
    file = open_predictor(path)
    random = np.random.default_rng(seed)
    texts = [random.integers(0, 100, length + steps) for length in lengths]
    routes = random.integers(0, 5, (len(lengths), steps, *(2, 2)))
    forecaster = SequenceForecaster(file)
    pasts = [Past(file, 1, length + steps) for length in lengths]
    forecasts = [
        forecaster.read_prompt(past, text[:length].tolist())
        for past, text, length in zip(pasts, texts, lengths, strict=True)
    ]
    alone = [Forecaster(file) for _ in lengths]
    for one, text, length, forecast in zip(alone, texts, lengths, forecasts, strict=True):
        one.reset(1)
        expected = one.forecast(text[None, :length], np.arange(length)[None])
        joined = join([forecast])
        assert joined is not None
        assert_same(joined[:4], expected[:4])
    for step in range(steps):
        newest = [int(text[n + step]) for text, n in zip(texts, lengths, strict=True)]
        forecasts = forecaster.step(pasts, newest, routes[:, step], forecasts)
        for i, one in enumerate(alone):
            one.observe(routes[i : i + 1, step])
            position = np.array([[lengths[i] + step]])
            expected = one.forecast(np.array([[newest[i]]]), position)
            joined = join([forecasts[i]])
            assert joined is not None
            assert_same(joined[:4], expected[:4])  # what is remembered, all of them share


def assert_same(ours: object, theirs: object) -> None:
    for one, other in zip(ours, theirs, strict=True):  # type: ignore[call-overload]
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_predictor_without_a_cache_cannot_serve(tmp_path: Path) -> None:
    path = write_predictor(tmp_path / "p.onnx", TOPOLOGY, cache=False)
    with pytest.raises(ValueError, match="export a causal one"):
        SequenceForecaster(open_predictor(path))
