"""Shapes of benchmarks: as large as published, and every one can be captured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.common.shapes import (
    DEEPSEEK_V2_LITE,
    GRANITE_4_H_TINY,
    QWEN3_NEXT_80B,
    Shape,
    build_model,
    empty_model,
    shape_named,
)
from runtime.kv.state_kinds import unsupported

BILLIONS = {
    "olmoe-7b": 6.9,
    "qwen3-30b-a3b": 30.5,
    "mixtral-8x7b": 46.7,
    "qwen3-next-80b-a3b": 79.7,
    "deepseek-v2-lite": 15.7,
    "granite-4-h-tiny": 6.9,
    "llama-4-scout": 107.8,
}
"""Weights of the text models."""
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 128}


@pytest.mark.parametrize("name", BILLIONS)
def test_a_shape_has_the_published_size_and_runs_in_captured_steps(name: str) -> None:
    model = empty_model(shape_named(name))
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert weights == pytest.approx(BILLIONS[name], rel=0.03)
    assert unsupported(model.config) is None


@pytest.mark.parametrize("shape", [QWEN3_NEXT_80B, GRANITE_4_H_TINY, DEEPSEEK_V2_LITE])
def test_random_weights_of_a_hybrid_model_give_finite_logits(shape: Shape) -> None:
    """With its buffers, or without any."""
    fewer: dict[str, Any] = {"num_hidden_layers": 6, "moe_intermediate_size": 32}
    if "layer_types" in shape.options:
        fewer["layer_types"] = shape.options["layer_types"][:6]
    if "mamba_n_heads" in shape.options:
        fewer |= {"mamba_n_heads": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = build_model(replace(shape, options=shape.options | SMALL | fewer), torch.device("cpu"))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(2, 9)[None]).logits
    assert logits.isfinite().all()
