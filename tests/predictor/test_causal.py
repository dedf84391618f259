"""The causal predictor: each prediction's dependencies; its cache changes no prediction."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.networks.causal import CausalPredictor, CausalSettings, truncated_svd
from predictor.networks.targets import following, multi_hot, targets
from predictor.networks.windows import Predictions, Windows
from routing.predictor_file.format import HEADS, PADDING
from routing.topology import NO_EXPERT
from tests.helpers.predicting import (
    NUM_EXPERTS,
    NUM_LAYERS,
    TOP_K,
    VOCAB_SIZE,
    assert_same,
    columns,
    joined,
    padding,
    predict,
    random_windows,
    shape,
    tiny_predictor,
)

WINDOW = 6


def changed_tokens(predictor: CausalPredictor, one: Windows, other: Windows) -> list[int]:
    """Columns at which any head answers differently."""
    left, right = predict(predictor, one), predict(predictor, other)
    differs_T = torch.zeros(one.token_ids_BT.shape[1], dtype=torch.bool)
    for a_BTLE, b_BTLE in zip(left, right, strict=True):
        differs_T |= ((a_BTLE - b_BTLE).abs() > 1e-5).any(-1).any(-1).any(0)
    return differs_T.nonzero().flatten().tolist()


def test_a_token_changes_no_prediction_before_it():
    batch = random_windows(1, 12)
    other = batch._replace(token_ids_BT=batch.token_ids_BT.clone())
    other.token_ids_BT[:, 5] = (other.token_ids_BT[:, 5] + 1) % VOCAB_SIZE
    assert min(changed_tokens(tiny_predictor(), batch, other)) == 5


def test_one_block_sees_exactly_the_window():
    batch = random_windows(1, 20)
    other = batch._replace(token_ids_BT=batch.token_ids_BT.clone())
    other.token_ids_BT[:, 3] = (other.token_ids_BT[:, 3] + 1) % VOCAB_SIZE
    predictor = tiny_predictor(window=WINDOW, blocks=1)
    assert changed_tokens(predictor, batch, other) == list(range(3, 3 + WINDOW))


def test_a_predecessors_routes_change_the_predictions_from_its_successor_on():
    batch = random_windows(1, 12)
    other = batch._replace(routes_BTLK=batch.routes_BTLK.clone())
    other.routes_BTLK[:, 4, 1, 0] = (other.routes_BTLK[:, 4, 1, 0] + 1) % NUM_EXPERTS
    other.routes_BTLK[:, 4, 1, 1] = other.routes_BTLK[:, 4, 1, 0]
    changed = changed_tokens(tiny_predictor(), batch, other)
    assert changed[0] == 4 and len(changed) > 1


def test_unknown_history_predicts_otherwise_than_known_history():
    batch = random_windows(1, 4)
    assert changed_tokens(tiny_predictor(), batch, batch.without_history()) == [0, 1, 2, 3]


def test_the_vector_of_unknown_history_is_added_exactly_where_history_is_unknown():
    predictor = tiny_predictor()
    routes = random_windows(1, 4).routes_BTLK
    routes[:, 2] = NO_EXPERT
    routes[:, 3, 1:] = NO_EXPERT
    with torch.no_grad():
        before_TD = predictor.embed_history(routes)[0]
        predictor.unknown_history_D += 1.0
        after_TD = predictor.embed_history(routes)[0]
    added_T = (after_TD - before_TD).mean(-1)
    torch.testing.assert_close(added_T, torch.tensor([0.0, 0.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_the_order_and_repetition_of_a_tokens_experts_do_not_matter():
    batch = random_windows(2, 7)
    twice = torch.cat((batch.routes_BTLK, batch.routes_BTLK.flip(-1)), -1)
    assert changed_tokens(tiny_predictor(), batch, batch._replace(routes_BTLK=twice)) == []


def test_only_distances_between_positions_matter():
    predictor, batch = tiny_predictor(), random_windows(2, 12)
    later = batch._replace(positions_BT=batch.positions_BT + 1000)
    torch.testing.assert_close(
        predict(predictor, batch).this_BTLE,
        predict(predictor, later).this_BTLE,
        atol=1e-3,
        rtol=1e-3,
    )


def test_documents_packed_into_one_row_are_predicted_as_if_alone():
    predictor = tiny_predictor(window=WINDOW)
    first, second = random_windows(2, 5), random_windows(2, 9, first=5 + WINDOW)
    together = predict(predictor, joined(first, second))
    assert_same(Predictions(*(x[:, :5] for x in together)), predict(predictor, first))
    assert_same(Predictions(*(x[:, 5:] for x in together)), predict(predictor, second))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_gives_no_nan(side):
    predictor, batch = tiny_predictor(), random_windows(2, 6)
    pad = padding(2, 4)
    padded = joined(pad, batch) if side == "left" else joined(batch, pad)
    span = slice(4, None) if side == "left" else slice(6)
    found = predict(predictor, padded)
    assert all(torch.isfinite(head_BTLE).all() for head_BTLE in found)
    assert_same(Predictions(*(x[:, span] for x in found)), predict(predictor, batch))


def run_with_ring(predictor: CausalPredictor, batch: Windows, cuts: list[int]) -> Predictions:
    """Feed the row piece by piece, keeping keys and values in a ring of `window` entries."""
    cache, window = predictor.cache, predictor.shape.window
    num_rows, num_tokens = batch.token_ids_BT.shape
    past = torch.randn(cache.blocks, 2, num_rows, cache.heads, window, cache.head_dim)
    past_positions = torch.full((num_rows, window), PADDING)
    outputs = []
    edges = sorted({0, *cuts, num_tokens})
    for start, stop in itertools.pairwise(edges):
        piece = columns(batch, slice(start, stop))
        with torch.no_grad():
            *heads, present = predictor.run_graph(*piece[:3], past, past_positions)
        kept = torch.arange(max(start, stop - window), stop)
        past[..., kept % window, :] = present[..., kept - start, :]
        past_positions[:, kept % window] = piece.positions_BT[:, kept - start]
        outputs.append(heads)
    return Predictions(*(torch.cat(parts, 1) for parts in zip(*outputs, strict=True)))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 19)), st.integers(1, 3))
def test_any_split_into_prefill_and_steps_over_a_ring_buffer_gives_the_same(tokens, cuts, batch):
    torch.manual_seed(tokens)
    predictor, row = tiny_predictor(), random_windows(batch, tokens, first=2)
    pieces = run_with_ring(predictor, row, [cut for cut in cuts if cut < tokens])
    assert_same(pieces, predict(predictor, row))


def test_an_empty_cache_is_no_cache():
    predictor, row = tiny_predictor(), random_windows(2, 5)
    cache = predictor.cache
    past = torch.zeros(cache.blocks, 2, 2, cache.heads, 0, cache.head_dim)
    with torch.no_grad():
        *heads, _ = predictor.run_graph(*row[:3], past, torch.zeros(2, 0, dtype=torch.int64))
    assert_same(Predictions(*heads), predict(predictor, row))


def test_calibration_is_applied_to_each_head():
    predictor, row = tiny_predictor(), random_windows(1, 3)
    before = predict(predictor, row)
    predictor.set_calibration(
        torch.tensor([2.0, 1.0, 0.5, 1.0]), torch.tensor([0.0, -1.0, 3.0, 0.0])
    )
    after = predict(predictor, row)
    torch.testing.assert_close(after.this_BTLE, before.this_BTLE * 2)
    torch.testing.assert_close(after.next_BTLE, before.next_BTLE - 1)
    torch.testing.assert_close(after.horizon_BTLE, before.horizon_BTLE * 0.5 + 3)
    torch.testing.assert_close(after.far_BTLE, before.far_BTLE)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 4), st.integers(1, 5))
def test_targets_are_what_the_tokens_ahead_in_the_same_document_use(lengths, pad, horizon):
    parts, first = [], 0
    for length in lengths:
        parts.append(random_windows(1, length, first=first))
        first += length + 10
    row = joined(*parts, padding(1, pad)) if pad else joined(*parts)
    sizes = shape(window=10, horizon=horizon)
    found = targets(row, sizes)
    used_TLE = multi_hot(row.experts_BTLK, NUM_EXPERTS)[0]
    num_tokens, start = len(used_TLE), 0
    for length in lengths:
        stop = start + length
        for t in range(start, stop):
            assert found.this.valid_BT[0, t]
            assert torch.equal(found.this.used_BTLE[0, t], used_TLE[t])
            assert bool(found.next.valid_BT[0, t]) == (t + 1 < stop)
            if t + 1 < stop:
                assert torch.equal(found.next.used_BTLE[0, t], used_TLE[t + 1])
            for count, target in ((horizon, found.horizon), (sizes.far, found.far)):
                cut_by_row = stop == num_tokens and t + count >= num_tokens
                assert bool(target.valid_BT[0, t]) == (t + 1 < stop and not cut_by_row)
                if t + 1 < stop:
                    ahead_LE = used_TLE[t + 1 : min(t + 1 + count, stop)].any(0)
                    assert torch.equal(target.used_BTLE[0, t], ahead_LE)
        start = stop
    assert not any(target.valid_BT[0, start:].any() for target in found)


def test_multi_hot_ignores_no_expert():
    experts = torch.tensor([[[[0, 2], [NO_EXPERT, 1]]]], dtype=torch.int16)
    assert multi_hot(experts, 3).tolist() == [[[[True, False, True], [False, True, False]]]]


def test_following_is_the_next_columns_value():
    assert following(torch.tensor([[1, 2, 3]]))[:, :2].tolist() == [[2, 3]]


def test_the_truncated_svd_keeps_the_angles_of_a_low_rank_matrix():
    matrix = torch.randn(50, 4) @ torch.randn(4, 30)
    reduced = truncated_svd(matrix, 4)
    cosines = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(
        cosines(reduced[:1], reduced[1:]), cosines(matrix[:1], matrix[1:]), atol=1e-3, rtol=1e-3
    )


def test_an_embedding_of_another_vocabulary_is_refused():
    predictor = tiny_predictor()
    with pytest.raises(ValueError, match=rf"4 rows.*vocabulary\s+has {VOCAB_SIZE}"):
        predictor.set_embedding(torch.randn(4, 16))


def test_an_embedding_padded_beyond_the_vocabulary_is_cut():
    predictor, embedding = tiny_predictor(), torch.randn(VOCAB_SIZE + 4, 5)
    predictor.set_embedding(embedding)
    weight = predictor.embedding_VR.weight
    torch.testing.assert_close(weight[:, :5], truncated_svd(embedding[:VOCAB_SIZE], 5))
    assert not weight[:, 5:].any()


def test_a_width_that_does_not_split_into_heads_is_refused():
    with pytest.raises(ValueError, match="attention_heads"):
        CausalSettings(width=20, attention_heads=8)


def test_training_starts_from_the_base_rate():
    predictor = CausalSettings(width=32, blocks=1).build(shape())
    probability = predict(predictor.eval(), random_windows(4, 8)).this_BTLE.sigmoid().mean()
    assert probability.item() == pytest.approx(TOP_K / NUM_EXPERTS, abs=0.05)
    assert predictor.heads.out_features == len(HEADS) * NUM_LAYERS * NUM_EXPERTS


def test_attention_heads_that_cannot_share_keys_and_values_evenly_are_refused():
    with pytest.raises(ValueError, match="4 attention heads cannot share 3"):
        CausalSettings(attention_heads=4, kv_heads=3)
