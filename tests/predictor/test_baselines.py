"""The baselines against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from predictor.evaluation.baselines import Frequency, PreviousToken, TokenTable, fit_baselines
from predictor.file.documents import whole_document
from predictor.networks.targets import targets
from predictor.networks.windows import PredictorShape, Windows
from predictor.training.metrics import route_metrics
from routing.predictor_file.format import HEADS
from routing.topology import NO_EXPERT
from tests.helpers.predicting import (
    NUM_EXPERTS,
    NUM_LAYERS,
    TOP_K,
    TOPOLOGY,
    VOCAB_SIZE,
    random_document,
)

SHAPE = PredictorShape.of(TOPOLOGY, "decoder", window=1, horizon=3)


def document(seed: int, length: int) -> Windows:
    made = random_document(np.random.default_rng(seed), length)
    return whole_document(made.token_ids_T, made.experts_TLK.astype(np.int16), length)


def skewed(seed: int, length: int) -> Windows:
    """A document whose low experts are used more often, whatever the tokens are."""
    rng = np.random.default_rng(seed)
    draws = rng.random((length, NUM_LAYERS, NUM_EXPERTS)) ** (1 + np.arange(NUM_EXPERTS))
    experts = np.argsort(-draws, axis=-1)[..., :TOP_K].astype(np.int16)
    return whole_document(rng.integers(VOCAB_SIZE, size=length), experts, length)


@pytest.fixture(scope="module")
def documents() -> list[Windows]:
    return [document(seed, 40) for seed in range(12)]


def recalls(predict, documents: list[Windows], head: str) -> Tensor:
    metrics, index = route_metrics(TOPOLOGY.stack()), HEADS.index(head)
    for batch in documents:
        answer = targets(batch, SHAPE)[index]
        logits = predict(batch)[index]
        metrics.update(logits[answer.valid_BT], answer.used_BTLE[answer.valid_BT])
    return metrics.compute()["recall"]


def test_frequency_is_the_share_of_tokens_that_used_each_expert() -> None:
    batch = skewed(0, 200)
    frequency = Frequency(SHAPE)
    frequency.count(batch, targets(batch, SHAPE))
    probability_LE = frequency(batch).this_BTLE.sigmoid()[0, 0]
    for layer in range(NUM_LAYERS):
        used = batch.experts_BTLK[0, :, layer].flatten().tolist()
        counts = torch.tensor([used.count(expert) for expert in range(NUM_EXPERTS)])
        torch.testing.assert_close(probability_LE[layer], (counts + 0.5) / 201)


def test_the_previous_tokens_experts_always_rank_first() -> None:
    fitted = [skewed(seed, 50) for seed in range(3)]
    frequency = Frequency(SHAPE)
    previous = PreviousToken(SHAPE, frequency)
    for batch in fitted:
        frequency.count(batch, targets(batch, SHAPE))
        previous.count(batch, targets(batch, SHAPE))
    batch = skewed(9, 30)
    for head_BTLE in previous(batch):
        best_TLK = head_BTLE[0, 1:].topk(TOP_K).indices.sort().values
        before_TLK = batch.experts_BTLK[0, :-1].long().sort().values
        assert torch.equal(best_TLK, before_TLK)


def test_the_previous_token_falls_back_to_frequency_where_it_is_unknown() -> None:
    fitted = skewed(0, 60)
    frequency, previous, _ = fit_baselines([fitted], SHAPE)
    batch = skewed(1, 10)
    for known, static in zip(previous(batch), frequency(batch), strict=True):
        assert torch.equal(known[:, 0], static[:, 0])
        assert not torch.allclose(known[:, 1:], static[:, 1:])
    for unknown, static in zip(previous(batch.without_history()), frequency(batch), strict=True):
        assert torch.equal(unknown, static)


def test_the_table_predicts_routes_that_follow_from_the_token(documents) -> None:
    *_, table = fit_baselines(documents, SHAPE)
    this_L = recalls(table, [document(99, 60)], "this")
    assert this_L[0] == pytest.approx(1.0)  # this layer routes by the token itself
    next_L = recalls(table, [document(99, 60)], "next")
    assert next_L[1] == pytest.approx(1.0)  # and this one by the token before
    assert this_L[1] < 0.6


def test_the_previous_token_predicts_routes_that_stay_the_same_in_a_document(documents) -> None:
    _, previous, table = fit_baselines(documents, SHAPE)
    held_out = [document(seed, 60) for seed in (97, 98)]
    assert recalls(previous, held_out, "this")[2] > 0.98
    assert recalls(previous, held_out, "horizon")[2] > 0.98
    assert recalls(table, held_out, "this")[2] < 0.6


def test_an_id_the_table_never_saw_gets_the_frequencies() -> None:
    seen = skewed(0, 50)
    seen = seen._replace(token_ids_BT=seen.token_ids_BT.clamp(max=3))
    frequency, _, table = fit_baselines([seen], SHAPE)
    unseen = seen._replace(token_ids_BT=torch.full_like(seen.token_ids_BT, 7))
    for by_id, static in zip(table(unseen), frequency(unseen), strict=True):
        torch.testing.assert_close(by_id, static)


def test_a_table_too_large_for_its_memory_keeps_the_first_ids() -> None:
    batch, frequency = document(0, 200), Frequency(SHAPE)
    frequency.count(batch, targets(batch, SHAPE))
    two_rows = 2 * 4 * len(HEADS) * NUM_LAYERS * NUM_EXPERTS
    table = TokenTable(SHAPE, frequency, np.array([5, 2, 8, 1]), max_bytes=two_rows)
    table.count(batch, targets(batch, SHAPE))
    known_T = torch.isin(batch.token_ids_BT[0], torch.tensor([5, 2]))
    differs_T = (table(batch).this_BTLE != frequency(batch).this_BTLE).flatten(2).any(-1)[0]
    assert torch.equal(differs_T, known_T)


def test_logits_are_calibrated_on_the_documents_of_the_fit() -> None:
    fitted = [skewed(seed, 400) for seed in range(3)]
    for baseline in fit_baselines(fitted, SHAPE):
        metrics = route_metrics(TOPOLOGY.stack())
        for batch in fitted:
            metrics.update(baseline(batch).this_BTLE[0], batch.experts_BTLK[0])
        assert metrics.compute()["calibration_error"].max() < 0.02


def test_dropped_tokens_count_for_no_expert() -> None:
    batch = skewed(0, 40)
    experts = batch.experts_BTLK.clone()
    experts[:, ::2] = NO_EXPERT
    dropped = batch._replace(experts_BTLK=experts)
    frequency, *_ = fit_baselines([dropped], SHAPE)
    rate_LE = frequency(batch).this_BTLE.sigmoid()[0, 0]
    assert rate_LE.sum(-1).tolist() == pytest.approx([TOP_K * 20.5 / 41] * NUM_LAYERS, rel=0.15)
