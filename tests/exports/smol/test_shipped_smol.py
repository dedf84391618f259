"""smol-moe as it ships: the differences, the record of their training, the predictor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from exports.demo_chat import SMOL_PREDICTOR
from exports.smol.checkpoint import SHIPPED
from exports.smol.differences import unpack
from exports.smol.settings import Experts
from routing.inspect_model import topology_of
from routing.predictor_file.reader import open_predictor

FOLDER = SHIPPED.parent
DENSE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "training.json").read_text())


def test_the_folder_stays_below_twelve_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12e6


def test_the_differences_are_of_smollm2_with_eight_experts_a_layer():
    differences = unpack(SHIPPED)
    assert differences.experts == Experts(num_experts=8, top_k=2, rank=6)
    assert differences.router_LEH.shape == (30, 8, 576)
    assert differences.pairs["gate_out"].shape == (30, 1536, 48)
    assert differences.pairs["down_in"].shape == (30, 48, 1536)
    assert all(pair.isfinite().all() for pair in differences.pairs.values())


def test_no_two_experts_of_a_layer_are_the_same():
    pairs = unpack(SHIPPED).pairs
    outer = pairs["down_out"].unflatten(2, (8, 6)).permute(0, 2, 1, 3)
    inner = pairs["down_in"].unflatten(1, (8, 6))
    for layer in (0, 14, 29):
        flat_EN = (outer[layer] @ inner[layer]).flatten(1)
        likeness = torch.nn.functional.cosine_similarity(flat_EN[:, None], flat_EN[None], dim=-1)
        assert likeness.fill_diagonal_(0).max() < 0.9


def test_the_record_keeps_the_promises_of_the_card(record):
    rows = record["held_out"]["perplexity"]
    assert all(row["mixture"] < row["dense"] for row in rows.values()) and len(rows) == 18
    assert record["routing"]["least_used"] > 0.2
    assert not any(str(Path.home()) in text for text in map(str, record.values()))


def test_the_predictor_is_of_the_model_that_is_assembled():
    differences = unpack(SHIPPED)
    config = MixtralConfig(
        **DENSE, vocab_size=49_152, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        num_local_experts=differences.experts.num_experts,
        num_experts_per_tok=differences.experts.top_k,
    )  # fmt: skip
    with torch.device("meta"):
        topology = topology_of(MixtralForCausalLM(config))
    found = open_predictor(SMOL_PREDICTOR).topology
    assert found.tokenizer is not None
    assert replace(found, tokenizer=None) == topology
