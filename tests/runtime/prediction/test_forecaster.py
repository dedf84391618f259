"""runtime.prediction.forecaster: the predictor's inputs, and the forecasts made of its answers.

The predictors are made by hand and have a known answer, see tests.helpers.onnx_predictor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.predictor_file.format import PADDING
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.topology import NO_EXPERT, Layer, Stack, Topology
from runtime.prediction.forecaster import Forecaster
from tests.helpers.onnx_predictor import write_predictor

L, E, K = 2, 5, 2
TOPOLOGY = Topology(
    model_type="olmoe",
    vocab_size=100,
    stacks=(Stack(name="decoder", layers=tuple(Layer(f"l{n}", E, K) for n in range(L))),),
    model="0" * 16,
)
WINDOW = 6

Open = Callable[..., PredictorFile]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """`opened(window=..., cache=..., far=...)`: a predictor of TOPOLOGY, made once."""
    made: dict[tuple[int, bool, bool], PredictorFile] = {}

    def predictor(window: int = WINDOW, cache: bool = True, far: bool = True) -> PredictorFile:
        if (window, cache, far) not in made:
            path, without = (
                tmp_path_factory.mktemp("onnx") / "predictor.onnx",
                () if far else ("far",),
            )
            write_predictor(path, TOPOLOGY, window=window, cache=cache, without=without)
            made[window, cache, far] = open_predictor(path)
        return made[window, cache, far]

    return predictor


class Spy:
    """A session that keeps its inputs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.feeds: list[dict[str, np.ndarray]] = []

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> Any:
        self.feeds.append({name: value.copy() for name, value in feeds.items()})
        return self._session.run(names, feeds)


def spied(file: PredictorFile) -> tuple[PredictorFile, list[dict[str, np.ndarray]]]:
    spy = Spy(file.session)
    return file._replace(session=spy), spy.feeds


def start(file: PredictorFile, batch_size: int = 1) -> Forecaster:
    forecaster = Forecaster(file)
    forecaster.reset(batch_size)
    return forecaster


def tokens(rng_seed: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(rng_seed).integers(0, 100, (batch, length))


def left_padded(lengths: list[int]) -> np.ndarray:
    """Positions [B, T] of sequences of the given lengths, padded at the left."""
    longest = max(lengths)
    return np.array([[*[PADDING] * (longest - n), *range(n)] for n in lengths])


def counts(token_ids_BT: np.ndarray, positions_BT: np.ndarray, window: int) -> np.ndarray:
    """The predictor's `this` for every token [B, T, L, E], from its definition."""
    batch, length = token_ids_BT.shape
    answer = np.zeros((batch, length, L, E), np.float32)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                distance = positions_BT[b, i] - positions_BT[b, j]
                if positions_BT[b, j] != PADDING and 0 <= distance < window:
                    answer[b, i, :, token_ids_BT[b, j] % E] += np.arange(1, L + 1)
    return answer


def onehots(index: np.ndarray) -> np.ndarray:
    """[..., L, E]: (l + 1) where the expert is index % E."""
    planes = (index[..., None] % E == np.arange(E)).astype(np.float32)
    return planes[..., None, :] * np.arange(1, L + 1)[:, None]


def used_by_any(logits: np.ndarray) -> np.ndarray:
    """1 - product of (1 - sigmoid) over all but the last two dimensions."""
    unused = 1 / (1 + np.exp(logits.astype(np.float64)))
    return 1 - unused.reshape(-1, L, E).prod(0)


# ---------------------------------------------------------------------- history


@settings(max_examples=40, deadline=None)
@given(
    window=st.sampled_from([1, 2, 6, 50]),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3),
)
def test_however_the_tokens_come_the_predictor_sees_the_window_before_each(
    opened: Open, window: int, chunks: list[int], lengths: list[int]
) -> None:
    """Left padding is the first chunk's; then chunks of one token or several, past the window."""
    first, *rest = chunks
    positions = left_padded([max(first + n - max(lengths), 0) for n in lengths])
    first = positions.shape[1]
    positions = np.hstack(
        [positions, positions.max(1, initial=-1)[:, None] + np.arange(1, sum(rest) + 1)]
    )
    token_ids = tokens(sum(chunks), len(lengths), first + sum(rest))
    expected = counts(token_ids, positions, window)
    forecaster = start(opened(window), len(lengths))
    stop = 0
    for size in [first, *rest]:
        start_, stop = stop, stop + size
        forecast = forecaster.forecast(token_ids[:, start_:stop], positions[:, start_:stop])
        assert forecaster.this_BLE is not None
        real = positions[:, stop - 1] != PADDING
        np.testing.assert_array_equal(forecaster.this_BLE[real], expected[real, stop - 1])
        valid = positions[:, start_:stop] != PADDING
        want = used_by_any(expected[:, start_:stop][valid])
        np.testing.assert_allclose(forecast.this_LE, want, atol=1e-6)


def test_token_by_token_predicts_what_one_pass_predicts(opened: Open) -> None:
    token_ids, positions = tokens(0, 2, 17), np.tile(np.arange(17), (2, 1))
    whole, stepwise = start(opened(), 2), start(opened(), 2)
    whole.forecast(token_ids, positions)
    for t in range(17):
        stepwise.forecast(token_ids[:, t : t + 1], positions[:, t : t + 1])
    assert whole.this_BLE is not None and stepwise.this_BLE is not None
    assert np.array_equal(whole.this_BLE, stepwise.this_BLE)


def test_the_memorys_look_up_may_run_before_or_after_the_predictor(opened: Open) -> None:
    forecasters = start(opened()), start(opened())
    rng = np.random.default_rng(0)
    for t, token in enumerate([3, 5, 3, 5, 7, 3, 5]):
        given = np.array([[token]]), np.array([[t]])
        routes_BLK = rng.integers(0, E, (1, L, K))
        forecasts = []
        for forecaster, looks_up_first in zip(forecasters, (True, False), strict=True):
            if looks_up_first:
                forecaster.look_up(*given)
            forecast = forecaster.predict(*given)
            if not looks_up_first:
                forecaster.look_up(*given)
            forecasts.append(forecast._replace(remembered=forecaster.recall()))
            forecaster.observe(routes_BLK)
        for ours, theirs in zip(*forecasts, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_routes_that_were_observed_are_remembered_across_a_reset(opened: Open) -> None:
    forecaster = start(opened())
    forecaster.forecast(np.array([[3]]), np.array([[0]]))
    forecaster.observe(np.array([[[1, 3]] * L]))
    forecaster.reset(1)
    before = start(opened()).forecast(np.array([[3]]), np.array([[0]])).remembered
    after = forecaster.forecast(np.array([[3]]), np.array([[0]])).remembered
    assert before is not None and after is not None
    assert (after[0, 0][:, [1, 3]] > before[0, 0][:, [1, 3]] + 0.1).all()


def test_the_history_is_never_longer_than_the_window(opened: Open) -> None:
    file, feeds = spied(opened())
    forecaster = start(file)
    forecaster.forecast(tokens(0, 1, 40), np.arange(40)[None])
    for t in range(40, 60):
        forecaster.forecast(tokens(t, 1, 1), np.array([[t]]))
    assert max(feed["token_ids"].shape[1] for feed in feeds) <= WINDOW
    assert {feed["past"].shape[4] for feed in feeds} == {WINDOW}


def test_a_reset_forgets_the_tokens_and_the_routes(opened: Open) -> None:
    forecaster, fresh = start(opened(), 2), start(opened(), 1)
    forecaster.forecast(tokens(0, 2, 9), np.tile(np.arange(9), (2, 1)))
    forecaster.observe(np.ones((2, L, K), np.int64))
    forecaster.reset(1)
    token_ids, positions = tokens(1, 1, 4), np.arange(4)[None]
    ours, theirs = (one.forecast(token_ids, positions) for one in (forecaster, fresh))
    assert np.array_equal(ours[:4], theirs[:4])


# ---------------------------------------------------------------------- routes


def test_a_tokens_routes_reach_its_successor_and_no_other_token(opened: Open) -> None:
    file, feeds = spied(opened())
    forecaster = start(file, 2)
    sizes = [3, 1, 2, 1]
    seen = [np.full((2, L, K), NO_EXPERT)]
    for number, size in enumerate(sizes):
        positions = np.tile(np.arange(size) + sum(sizes[:number]), (2, 1))
        forecaster.forecast(tokens(number, 2, size), positions)
        seen.append(np.random.default_rng(number).integers(0, E, (2, L, K)))
        forecaster.observe(seen[-1])
    for feed, routes_BLK in zip(feeds, seen, strict=False):
        assert np.array_equal(feed["routes"][:, 0], routes_BLK)
        assert (feed["routes"][:, 1:] == NO_EXPERT).all()


def test_routes_decide_the_prediction_of_the_next_step_alone(opened: Open) -> None:
    forecaster = start(opened())
    forecaster.forecast(tokens(0, 1, 2), np.array([[0, 1]]))
    forecaster.observe(np.array([[[1, 3], [NO_EXPERT, 3]]]))
    known = forecaster.forecast(tokens(1, 1, 1), np.array([[2]]))
    unknown = forecaster.forecast(tokens(2, 1, 1), np.array([[3]]))
    logits_LE = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 2, 0]], np.float32)
    np.testing.assert_allclose(known.horizon_LE, used_by_any(logits_LE), atol=1e-6)
    np.testing.assert_allclose(unknown.horizon_LE, 0.5, atol=1e-6)
    np.testing.assert_allclose(known.far_LE, used_by_any(2 * logits_LE), atol=1e-6)


def test_without_a_far_head_the_far_horizon_is_four_independent_horizons(opened: Open) -> None:
    forecaster = start(opened(far=False))
    made = forecaster.forecast(tokens(0, 1, 2), np.array([[0, 1]]))
    np.testing.assert_allclose(made.far_LE, 1 - (1 - made.horizon_LE) ** 4, atol=1e-6)


def test_routes_are_given_to_the_first_token_of_a_prompt_longer_than_the_window_once(
    opened: Open,
) -> None:
    file, feeds = spied(opened())
    forecaster = start(file)
    forecaster.observe(np.ones((1, L, K), np.int64))
    forecaster.forecast(tokens(0, 1, 2 * WINDOW), np.arange(2 * WINDOW)[None])
    assert [(feed["routes"] != NO_EXPERT).any() for feed in feeds] == [True, False]


# ---------------------------------------------------------------------- union


def test_this_step_is_joined_over_batch_and_tokens_and_later_steps_over_the_last_tokens(
    opened: Open,
) -> None:
    token_ids, positions = tokens(3, 3, 5), left_padded([5, 2, 4])
    forecast = start(opened(), 3).forecast(token_ids, positions)
    expected = counts(token_ids, positions, WINDOW)[positions != PADDING]
    np.testing.assert_allclose(forecast.this_LE, used_by_any(expected), atol=1e-6)
    np.testing.assert_allclose(forecast.next_LE, used_by_any(onehots(token_ids[:, -1])), atol=1e-6)
    assert all(plane.shape == (L, E) for plane in forecast[:4])
    assert forecast.remembered is not None and forecast.remembered.shape == (2, 4, L, E)


def test_a_padded_sequence_predicts_what_it_predicts_alone(opened: Open) -> None:
    token_ids, positions = tokens(3, 2, 9), left_padded([9, 4])
    both, alone = start(opened(), 2), start(opened())
    both.forecast(token_ids, positions)
    alone.forecast(token_ids[1:, 5:], positions[1:, 5:])
    assert both.this_BLE is not None and alone.this_BLE is not None
    assert np.array_equal(both.this_BLE[1], alone.this_BLE[0])


def test_a_sequence_of_padding_only_adds_nothing(opened: Open) -> None:
    token_ids = tokens(3, 2, 4)
    positions = np.array([[0, 1, 2, 3], [PADDING] * 4])
    both = start(opened(), 2).forecast(token_ids, positions)
    alone = start(opened()).forecast(token_ids[:1], positions[:1])
    assert both.remembered is not None and alone.remembered is not None
    np.testing.assert_allclose(both.remembered, alone.remembered, atol=1e-7)
    for one, other in zip(both[:4], alone[:4], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)


class Nonsense:
    """A session that answers with NaN and infinities."""

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        batch, length = feeds["token_ids"].shape
        logits = np.full((batch, length, L, E), np.nan, np.float32)
        logits[..., 0], logits[..., 1] = np.inf, -np.inf
        return [logits] * 3 + [np.zeros((1, 2, batch, 1, length, E), np.float32)]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_predictor_that_answers_nan_and_infinities_still_gives_probabilities(
    opened: Open,
) -> None:
    forecaster = start(opened()._replace(session=Nonsense()))
    for plane in forecaster.forecast(tokens(0, 1, 3), np.arange(3)[None])[:4]:
        assert plane.tolist() == [[1, 0, 0, 0, 0]] * L


# ---------------------------------------------------------------------- stateless files


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 15), min_size=1, max_size=12),
    window=st.sampled_from([2, 3, 6, 50]),
)
def test_a_predictor_without_a_cache_is_fed_the_prompts_end_and_the_newest_tokens_of_its_window(
    opened: Open, chunks: list[int], window: int
) -> None:
    file, feeds = spied(opened(window, cache=False))
    forecaster = start(file)
    numbers = np.arange(sum(chunks))[None]  # token ids that say where they stand
    stop = 0
    for size in chunks:
        begin, stop = stop, stop + size
        forecaster.forecast(numbers[:, begin:stop], numbers[:, begin:stop])
        fed = feeds[-1]["token_ids"][0]
        assert fed[-1] == stop - 1 and (np.diff(fed) > 0).all()
        assert np.array_equal(feeds[-1]["positions"][0], np.arange(len(fed)))
    assert max(feed["token_ids"].shape[1] for feed in feeds) <= window


def test_a_predictor_without_a_cache_is_told_the_prompts_length(opened: Open) -> None:
    file, feeds = spied(opened(cache=False))
    forecaster = start(file)
    forecaster.forecast(np.arange(4)[None], np.arange(4)[None])
    for t in range(4, 9):
        forecaster.forecast(np.array([[t]]), np.array([[t]]))
    fed = [feed["token_ids"][0].tolist() for feed in feeds]
    lengths = [int(feed["prompt_lengths"][0]) for feed in feeds]
    assert lengths == [4, 3, 3, 3, 3, 3]
    assert fed == [
        [0, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [1, 2, 3, 5, 6, 7],
        [1, 2, 3, 6, 7, 8],
    ]  # fmt: skip


def test_a_predictor_without_a_cache_answers_for_the_new_tokens_alone(opened: Open) -> None:
    file = opened(50, cache=False)
    forecaster = start(file, 2)
    token_ids = tokens(0, 2, 7)
    positions = np.hstack([left_padded([4, 2]), np.array([[4, 5, 6], [2, 3, 4]])])
    expected = counts(token_ids, positions, 50)
    forecaster.forecast(token_ids[:, :4], positions[:, :4])
    forecast = forecaster.forecast(token_ids[:, 4:], positions[:, 4:])
    np.testing.assert_allclose(forecast.this_LE, used_by_any(expected[:, 4:]), atol=1e-6)
    assert forecaster.this_BLE is not None
    assert np.array_equal(forecaster.this_BLE, expected[:, -1])
