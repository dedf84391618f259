"""Architectures whose calls or states are out of the common, in captured steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from routing.layers import find_moe_layers
from runtime.weights.gated_experts import gated_layout
from runtime.weights.source import from_module
from tests.helpers.architectures import OVERRIDES, architecture_model
from tests.helpers.capturing import captured


@pytest.mark.parametrize("kind", ["llama4_text", "longcat_flash", "qwen3_vl_moe", "lfm2_moe"])
def test_they_give_the_stock_models_tokens(kind: str) -> None:
    """Scaled tokens, experts without parameters, positions of three kinds, convolutions."""
    assert captured(kind) == "yes"


@pytest.mark.parametrize("kind", ["llama4_text", "longcat_flash", "qwen3_next"])
def test_they_do_when_they_are_compiled_too(kind: str) -> None:
    """Scaled tokens, experts without parameters of which a step needs some, recurrences."""
    torch._dynamo.reset()
    assert captured(kind, compile=True) == "yes"


def test_a_token_that_two_experts_get_scaled_differently_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OVERRIDES, "llama4_text", {"num_experts_per_tok": 2})
    assert captured("llama4_text").startswith("no: each of a token's experts gets it scaled")


@pytest.mark.parametrize("limit", [7.0, 10.0, 500.0])
def test_a_bound_of_an_activation_is_seen_wherever_it_is(limit: float) -> None:
    """Else kernels would leave it out."""
    model: Any = architecture_model("step3p7")
    source = from_module(model, None)
    layers = find_moe_layers(model)
    specs = source.store.specs(0)
    assert not isinstance(gated_layout(layers[0], specs), str)
    layers[0].module.limit = limit  # type: ignore[assignment]
    assert "activation" in str(gated_layout(layers[0], specs))
