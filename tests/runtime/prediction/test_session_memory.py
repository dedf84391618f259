"""runtime.prediction.session_memory: what followed the same tokens, for each sequence apart."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from routing.topology import NO_EXPERT, Layer, Stack
from runtime.prediction.session_memory import Place, SessionMemory, join_recalled

L, E, K, HORIZON = 2, 10, 2, 2
STACK = Stack(name="decoder", layers=tuple(Layer(str(layer), E, K) for layer in range(L)))


def routes_of(token: int) -> np.ndarray:
    """Token t uses the experts t and t + 1."""
    return np.tile([token % E, (token + 1) % E], (L, 1))


def read(memory: SessionMemory, tokens: list[int], place: Place = None) -> Place:
    for token in tokens:
        place = memory.add(place, token, routes_of(token))
    return place


def likeliest(plane_LE: np.ndarray, count: int = K) -> list[int]:
    """The experts of highest probability in every layer alike."""
    best = np.sort(np.argsort(-plane_LE, axis=1, kind="stable")[:, :count], axis=1)
    assert (best == best[0]).all()
    return best[0].tolist()


def test_a_token_that_ran_before_is_recalled_with_what_it_used_and_what_followed() -> None:
    memory = SessionMemory(STACK, HORIZON)
    place = read(memory, [1, 3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0])
    this, following, horizon, _ = memory.recall(place, 1)
    assert likeliest(this) == [1, 2]
    assert likeliest(following) == [3, 4]
    assert likeliest(horizon, 4) == [3, 4, 5, 6]


def test_where_more_tokens_agree_the_past_counts_more() -> None:
    memory = SessionMemory(STACK, HORIZON)
    place = read(memory, [8, 1, 3, 0, 6, 1, 5, 0, 6, 1, 5, 0, 6, 1, 5, 0, 8])
    assert likeliest(memory.recall(place, 1)[1]) == [3, 4], (
        "after 8 1 came 3, though after 1 often 5"
    )


def test_of_equal_places_the_newer_counts_more() -> None:
    memory = SessionMemory(STACK, HORIZON)
    read(memory, [1, 3, 0])
    read(memory, [1, 5, 0])
    assert likeliest(memory.recall(None, 1)[1]) == [5, 6]


def test_what_follows_is_looked_for_in_the_same_sequence() -> None:
    memory = SessionMemory(STACK, HORIZON)
    one, other = memory.add(None, 1, routes_of(1)), memory.add(None, 8, routes_of(8))
    for token in (3, 5):
        one, other = memory.add(one, token, routes_of(token)), memory.add(other, 0, routes_of(0))
    assert likeliest(memory.recall(None, 1)[1]) == [3, 4]


def test_a_token_never_seen_is_given_the_usual_frequencies() -> None:
    memory = SessionMemory(STACK, HORIZON)
    read(memory, [4] * 30)
    recalled = memory.recall(None, 77)
    assert [likeliest(plane) for plane in recalled] == [[4, 5]] * 4
    assert (recalled[:, :, 4] > 0.5).all()


def test_a_token_whose_routes_are_unknown_is_not_remembered() -> None:
    memory = SessionMemory(STACK, HORIZON)
    before = memory.recall(None, 1)
    assert memory.add(None, 1, np.full((L, K), NO_EXPERT)) is None
    assert np.array_equal(memory.recall(None, 1), before)


def test_the_oldest_tokens_are_forgotten_and_their_places_lead_nowhere() -> None:
    memory = SessionMemory(STACK, HORIZON, capacity=8)
    first = memory.add(None, 1, routes_of(1))
    read(memory, [3, 5], first)
    fresh = memory.recall(None, 99)
    read(memory, [20 + number for number in range(8)])
    assert likeliest(memory.recall(None, 1)[1]) != [3, 4]
    assert not np.array_equal(fresh, memory.recall(None, 99))
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
        recalled = memory.recall(places.get(sequence), token)
        assert recalled.shape == (4, L, E)
        assert ((recalled >= 0) & (recalled <= 1)).all()
        routes = routes_of(token) if is_known else np.full((L, K), NO_EXPERT)
        places[sequence] = memory.add(places.get(sequence), token, routes)
        assert sum(map(len, memory._index.values())) <= 2 * capacity


def test_what_several_sequences_recall_is_what_any_of_them_uses() -> None:
    half, quarter = np.full((4, L, E), 0.5), np.full((4, L, E), 0.25)
    assert np.allclose(join_recalled([half, quarter]), 0.625)
    assert join_recalled([half]) is half
