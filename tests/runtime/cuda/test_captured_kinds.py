"""Architectures whose calls or states are out of the common, in captured steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from routing.layers import find_moe_layers
from runtime.serving.request import Request
from runtime.weights.gated_experts import gated_layout
from runtime.weights.source import from_module
from tests.helpers.architectures import OVERRIDES, architecture_model
from tests.helpers.capturing import captured
from tests.helpers.fake_cuda import fake_cuda, load_fake
from tests.helpers.tiny import tiny_model


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "kind",
    ["llama4_text", "longcat_flash", "qwen3_vl_moe", "lfm2_moe", "hy_v4", "inkling2_text", "dbrx",
     "jetmoe"],
)  # fmt: skip
def test_they_give_the_stock_models_tokens_and_logits(kind: str) -> None:
    """Scaled tokens, experts without parameters, positions of three kinds, convolutions, bounded
    and capped activations, matrices that lie apart, experts in attention.
    """
    assert captured(kind) == "yes"


def test_a_long_prompt_of_a_window_beside_a_recurrence_sees_no_more_than_the_window() -> None:
    """transformers' own masks for static caches leave the window out."""
    assert captured("inkling_text", long=True) == "yes"


def test_matrices_that_lie_apart_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    stock: Any = architecture_model("dbrx")
    experts = "transformer.blocks.0.ffn.experts.mlp"
    with fake_cuda(monkeypatch):
        model = load_fake(architecture_model("dbrx"), memory=0.5)
        found = model.expertflow._backend.read_expert(0, 3)
        for name in ("w1", "v1", "w2"):
            whole = stock.get_parameter(f"{experts}.{name}")
            assert torch.equal(found[f"mlp.{name}"], whole.unflatten(0, (8, -1))[3])
        model.expertflow.detach()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, stock.state_dict()[name]), name


def test_matrices_of_other_names_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    stock: Any = architecture_model("jetmoe")
    with fake_cuda(monkeypatch):
        model = load_fake(architecture_model("jetmoe"), memory=0.5)
        found = model.expertflow._backend.read_expert(1, 3)
        for name in ("input_linear.weight", "output_linear.weight"):
            assert torch.equal(found[name], stock.get_parameter(f"model.layers.1.mlp.{name}")[3])
        model.expertflow.detach()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, stock.state_dict()[name]), name


def test_a_step_that_would_wait_for_the_device_is_noticed_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check has teeth."""
    monkeypatch.setattr("runtime.cuda.decode.fused_forward.sorted_forwards", lambda _: [])
    with pytest.raises(AssertionError, match="waits for the device: tolist"):
        captured("jetmoe")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["llama4_text", "longcat_flash", "qwen3_next", "jetmoe", "phimoe"])
def test_they_do_when_they_are_compiled_too(kind: str) -> None:
    """Scaled tokens, experts without parameters of which a step needs some, recurrences, experts in
    attention, constants made on the host.
    """
    torch._dynamo.reset()
    assert captured(kind, compile=True) == "yes"


def test_a_token_that_two_experts_get_scaled_differently_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OVERRIDES, "llama4_text", {"num_experts_per_tok": 2})
    assert captured("llama4_text").startswith("no: each of a token's experts gets it scaled")


@pytest.mark.parametrize("limit", [7.0, 10.0, 500.0])
def test_a_bound_of_an_activation_is_seen_wherever_it_is(limit: float) -> None:
    """Else kernels would leave it out. Behind SiLU it is another one than before it, but from where
    SiLU changes nothing any more.
    """
    model: Any = architecture_model("step3p7")
    source = from_module(model, None)
    layers = find_moe_layers(model)
    specs = source.store.specs(0)
    assert not isinstance(gated_layout(layers[0], specs), str)
    layers[0].module.limit = limit  # type: ignore[assignment]
    found = gated_layout(layers[0], specs)
    if limit < 100:
        assert "activation" in str(found)
    else:
        assert not isinstance(found, str)
        assert (found.activation, found.bounds) == ("bounded_silu", (limit, limit))


def test_keys_rotated_by_the_longest_position_of_a_step_are_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Phi-3.5-MoE's: each step waits for that position."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
            "factor": 8.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}  # fmt: skip
    stock: Any = tiny_model("olmoe", rope_parameters=rope, max_position_embeddings=256)
    asked = [Request(id="one", prompt=[5, 6, 7], max_tokens=3, ignore_eos=True)]
    ids_BT = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = stock.generate(ids_BT, pad_token_id=0, **settings)
    with fake_cuda(monkeypatch):
        model = load_fake(stock, memory=1.0, context=32)
        with pytest.warns(UserWarning, match="longest position"):
            found = model.generate(ids_BT, pad_token_id=0, **settings)
        assert "longest position" in model.expertflow.decode_path
        (result,) = model.expertflow.serve(asked)
    assert torch.equal(found, expected)
    assert list(result.token_ids) == expected[0, 3:].tolist()
