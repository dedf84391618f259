"""The causal predictor's blocks: their computation, and the layers read out after each."""

from __future__ import annotations

import pytest
import torch

from predictor.networks.causal import CausalSettings
from tests.helpers.predicting import (
    NUM_LAYERS,
    assert_same,
    predict,
    random_windows,
    tiny_predictor,
)


def test_the_first_layers_experts_are_read_out_before_the_last_block():
    predictor, batch = tiny_predictor(blocks=2), random_windows(1, 5)
    before = predict(predictor, batch)
    with torch.no_grad():
        predictor.blocks[-1].mlp[-1].weight.add_(1.0)
    after = predict(predictor, batch)
    early = predictor.settings.early_stages(NUM_LAYERS)
    assert list(early) == [1] and 0 < early[1] < NUM_LAYERS
    same_BTL = (before.this_BTLE == after.this_BTLE).all(-1)
    assert same_BTL[..., : early[1]].all() and not same_BTL[..., early[1] :].any()
    assert not (before.next_BTLE == after.next_BTLE).all(-1).any()


@pytest.mark.parametrize(
    ("blocks", "stages", "early"),
    [(6, 3, {2: 5, 4: 5}), (6, 1, {}), (4, 3, {2: 5, 3: 5}), (2, 2, {1: 8}), (5, 2, {3: 8})],
)
def test_stages_divide_blocks_and_layers_evenly(blocks: int, stages: int, early: dict[int, int]):
    assert CausalSettings(blocks=blocks, stages=stages).early_stages(16) == early


def test_a_model_of_fewer_layers_than_stages_has_no_empty_stage():
    assert CausalSettings(blocks=3, stages=3).early_stages(2) == {2: 1}
    assert CausalSettings(blocks=3, stages=3).early_stages(1) == {}


@pytest.mark.parametrize("stages", [0, 3])
def test_stages_that_do_not_fit_the_blocks_are_refused(stages: int):
    with pytest.raises(ValueError, match=f"{stages} stages do not fit 2 blocks"):
        CausalSettings(blocks=2, stages=stages)


def test_the_size_of_queries_and_keys_does_not_matter():
    predictor, batch = tiny_predictor(blocks=1), random_windows(2, 9)
    attention, before = predictor.blocks[0].attention, predict(predictor, batch)
    scaled = (attention.heads + attention.kv_heads) * attention.norm.weight.numel()
    with torch.no_grad():
        attention.qkv.weight[:scaled] *= 100.0
        assert_same(predict(predictor, batch), before)
        attention.qkv.weight[scaled:] *= 2.0
    assert (predict(predictor, batch).this_BTLE - before.this_BTLE).abs().max() > 1e-3


def test_a_blocks_nonlinearity_is_the_square_of_what_is_positive():
    activation = tiny_predictor().blocks[0].mlp[1]
    x = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    assert activation(x).tolist() == [0.0, 0.0, 0.25, 9.0]
