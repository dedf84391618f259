"""runtime.prediction.session_memory: what followed the like, for each sequence apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.topology import NO_EXPERT, Layer, Stack
from runtime.prediction.session_memory import Place, SessionMemory, join_recalled

L, E, K, HORIZON = 2, 10, 2, 2
STACK = Stack(name="decoder", layers=tuple(Layer(str(layer), E, K) for layer in range(L)))


def routes_of(token: int) -> np.ndarray:
    """Token t uses the experts t and t + 1."""
    return np.tile([token % E, (token + 1) % E], (L, 1))


def logits_of(token: int) -> np.ndarray:
    """What a predictor might expect after a token: the experts t + 5 and t + 6."""
    logits = np.full((L, E), -3.0, np.float32)
    logits[:, [(token + 5) % E, (token + 6) % E]] = 3.0
    return logits


def add(memory: SessionMemory, before: Place, token: int) -> Place:
    return memory.add(memory.cue(before, token, logits_of(token)), routes_of(token))


def read(memory: SessionMemory, tokens: list[int], place: Place = None) -> Place:
    for token in tokens:
        place = add(memory, place, token)
    return place


def recall(memory: SessionMemory, before: Place, token: int) -> np.ndarray:
    """What followed the same token, [4, L, E]."""
    same: np.ndarray = memory.recall(memory.cue(before, token, logits_of(token)))[0]
    return same


def likeliest(plane_LE: np.ndarray, count: int = K) -> list[int]:
    """The experts of highest probability in every layer alike."""
    best = np.sort(np.argsort(-plane_LE, axis=1, kind="stable")[:, :count], axis=1)
    assert (best == best[0]).all()
    return best[0].tolist()


def test_a_token_that_ran_before_is_recalled_with_what_it_used_and_what_followed() -> None:
    memory = SessionMemory(STACK, HORIZON)
    place = read(memory, [1, 3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0])
    this, following, horizon, _ = recall(memory, place, 1)
    assert likeliest(this) == [1, 2]
    assert likeliest(following) == [3, 4]
    assert likeliest(horizon, 4) == [3, 4, 5, 6]


def test_where_more_tokens_agree_the_past_counts_more() -> None:
    memory = SessionMemory(STACK, HORIZON)
    place = read(memory, [8, 1, 3, 0, 6, 1, 5, 0, 6, 1, 5, 0, 6, 1, 5, 0, 8])
    assert likeliest(recall(memory, place, 1)[1]) == [3, 4], (
        "after 8 1 came 3, though after 1 often 5"
    )


def test_of_equal_places_the_newer_counts_more() -> None:
    memory = SessionMemory(STACK, HORIZON)
    read(memory, [1, 3, 0])
    read(memory, [1, 5, 0])
    assert likeliest(recall(memory, None, 1)[1]) == [5, 6]


def test_what_follows_is_looked_for_in_the_same_sequence() -> None:
    memory = SessionMemory(STACK, HORIZON)
    one, other = add(memory, None, 1), add(memory, None, 8)
    for token in (3, 5):
        one, other = add(memory, one, token), add(memory, other, 0)
    assert likeliest(recall(memory, None, 1)[1]) == [3, 4]


def test_a_token_never_seen_is_given_the_usual_frequencies() -> None:
    memory = SessionMemory(STACK, HORIZON)
    read(memory, [4] * 30)
    recalled = recall(memory, None, 77)
    assert [likeliest(plane) for plane in recalled] == [[4, 5]] * 4
    assert (recalled[:, :, 4] > 0.5).all()


def test_a_token_whose_routes_are_unknown_is_not_remembered() -> None:
    memory = SessionMemory(STACK, HORIZON)
    before = recall(memory, None, 1)
    unknown = np.full((L, K), NO_EXPERT)
    assert memory.add(memory.cue(None, 1, logits_of(1)), unknown) is None
    assert np.array_equal(recall(memory, None, 1), before)


def test_a_token_never_seen_is_expected_to_use_what_followed_tokens_alike() -> None:
    """A token is 100 times its kind and a number; the predictor foresees the same after a kind."""
    memory, random, place = SessionMemory(STACK, HORIZON), np.random.default_rng(0), None
    for number in range(60):
        kind = int(random.integers(4))
        cue = memory.cue(place, 100 * number + kind, logits_of(2 * kind))
        place = memory.add(cue, routes_of(2 * kind))
    same, alike = memory.recall(memory.cue(place, 9999, logits_of(4)))
    assert likeliest(alike[0]) == [4, 5]
    assert (alike[0, :, 4] > same[0, :, 4] + 0.3).all()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e30])
def test_a_predictor_that_says_nonsense_spoils_nothing(odd: float) -> None:
    memory, place = SessionMemory(STACK, HORIZON), None
    for token in (1, 3, 5, 1, 3):
        cue = memory.cue(place, token, np.full((L, E), odd, np.float32))
        place = memory.add(cue, routes_of(token))
    recalled = memory.recall(memory.cue(place, 1, logits_of(1)))
    assert ((recalled >= 0) & (recalled <= 1)).all()
    assert likeliest(recalled[0, 0]) == [1, 2]


def test_the_oldest_tokens_are_forgotten_and_their_places_lead_nowhere() -> None:
    memory = SessionMemory(STACK, HORIZON, capacity=8)
    first = add(memory, None, 1)
    read(memory, [3, 5], first)
    fresh = recall(memory, None, 99)
    read(memory, [20 + number for number in range(8)])
    assert likeliest(recall(memory, None, 1)[1]) != [3, 4]
    assert not np.array_equal(fresh, recall(memory, None, 99))
    read(memory, [9], first)  # the token before it is forgotten


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.booleans()), max_size=80),
    st.integers(1, 12),
)
def test_whatever_runs_the_memory_stays_small_and_recalls_probabilities(
    tokens: list[tuple[int, int, bool]], capacity: int
) -> None:
    memory = SessionMemory(STACK, HORIZON, capacity=capacity)
    places: dict[int, Place] = {}
    for sequence, token, is_known in tokens:
        cue = memory.cue(places.get(sequence), token, logits_of(token))
        recalled = memory.recall(cue)
        assert recalled.shape == (2, 4, L, E)
        assert ((recalled >= 0) & (recalled <= 1)).all()
        routes = routes_of(token) if is_known else np.full((L, K), NO_EXPERT)
        places[sequence] = memory.add(cue, routes)
        assert sum(map(len, memory._index.values())) <= 2 * capacity


def test_what_several_sequences_recall_is_what_any_of_them_uses() -> None:
    half, quarter = np.full((4, L, E), 0.5), np.full((4, L, E), 0.25)
    assert np.allclose(join_recalled([half, quarter]), 0.625)
    assert join_recalled([half]) is half
