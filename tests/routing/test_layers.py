"""routing.layers: finding MoE layers in models, and reading the routes of an experts call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from routing.layers import MoELayer, Routes, by_stack, find_moe_layers, read_routes
from routing.topology import NO_EXPERT
from tests.helpers.tiny import KINDS, tiny_model

FUSED = [kind for kind in KINDS if kind != "switch_transformers"]
TOKENS = torch.arange(2, 26).view(2, 12)


def run(model: nn.Module) -> None:
    decoder = {"decoder_input_ids": TOKENS[:, :5]} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    with torch.inference_mode():
        model(TOKENS, **decoder)


def routers(model: nn.Module) -> dict[str, Any]:
    """Path of the experts -> the result of their router in one pass."""
    returned: dict[str, Any] = {}
    for layer in find_moe_layers(model):
        path = layer.name.rpartition(".")[0]
        block: Any = model.get_submodule(path)
        router = block.router if hasattr(block, "router") else block.gate
        router.register_forward_hook(
            lambda _, __, output, name=layer.name: returned.update({name: output})
        )
    run(model)
    return returned


def recorded(model: nn.Module) -> dict[str, Routes]:
    """Path of the experts -> the routes that `read_routes` reads in one pass."""
    seen: dict[str, Routes] = {}

    def hook(layer: MoELayer) -> Any:
        return lambda _, args, kwargs: seen.update({layer.name: read_routes(layer, args, kwargs)})

    for layer in find_moe_layers(model):
        layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True)
    run(model)
    return seen


@pytest.mark.parametrize("kind", FUSED)
def test_routes_are_the_routers_decision(kind: str) -> None:
    model = tiny_model(kind)
    decided, seen = routers(model), recorded(model)
    assert len(seen) == len(find_moe_layers(model))
    for name, routes in seen.items():
        assert routes.experts_TK.dtype == torch.int64
        assert torch.equal(routes.experts_TK, decided[name][2])
        assert torch.equal(routes.weights_TK, decided[name][1])


def test_switch_routes_are_the_routers_decision_and_drops_have_no_expert() -> None:
    model = tiny_model("switch_transformers", expert_capacity=2)
    decided, seen = routers(model), recorded(model)
    num_dropped = 0
    for name, routes in seen.items():
        onehot_TE = next(t for t in decided[name] if not t.is_floating_point()).flatten(0, -2)
        dropped_T = onehot_TE.sum(-1) == 0
        num_dropped += int(dropped_T.sum())
        assert (routes.experts_TK[dropped_T] == NO_EXPERT).all()
        assert torch.equal(routes.experts_TK[~dropped_T, 0], onehot_TE[~dropped_T].argmax(-1))
    assert len(seen) == 4
    if num_dropped == 0:
        pytest.skip("this version of transformers does not enforce the experts' capacity")


def test_ids_beyond_the_real_experts_are_no_expert() -> None:
    """Some models route tokens to parameter-free experts behind the last real one."""
    layer = find_moe_layers(tiny_model("olmoe"))[0]
    index_TK = torch.tensor([[0, 8], [7, 11]])
    routes = read_routes(layer, (torch.zeros(2, 32), index_TK, torch.ones(2, 2)), {})
    assert routes.experts_TK.tolist() == [[0, NO_EXPERT], [7, NO_EXPERT]]


@pytest.mark.parametrize("named", [0, 1, 2, 3])
def test_routes_are_read_from_positional_and_named_arguments_alike(named: int) -> None:
    layer = find_moe_layers(tiny_model("mixtral"))[0]
    values = torch.zeros(1, 32), torch.tensor([[3, 5]]), torch.tensor([[0.25, 0.75]])
    names = ("hidden_states", "top_k_index", "top_k_weights")
    split = 3 - named
    kwargs = dict(zip(names[split:], values[split:], strict=True))
    routes = read_routes(layer, values[:split], kwargs)
    assert routes.experts_TK.tolist() == [[3, 5]]
    assert routes.weights_TK.tolist() == [[0.25, 0.75]]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_found_in_the_order_they_run(kind: str) -> None:
    model = tiny_model(kind)
    assert [layer.name for layer in find_moe_layers(model)] == list(recorded(model))


def test_encoder_and_decoder_stacks_are_kept_apart() -> None:
    stacks = dict(by_stack(find_moe_layers(tiny_model("switch_transformers"))))
    assert {name: len(layers) for name, layers in stacks.items()} == {"encoder": 2, "decoder": 2}
    assert all(layer.name.startswith("encoder.") for layer in stacks["encoder"])


def test_a_dense_layer_between_moe_layers_is_left_out() -> None:
    names = [layer.name for layer in find_moe_layers(tiny_model("qwen3_moe"))]
    assert names == [f"model.layers.{n}.mlp.experts" for n in (0, 2, 3)]


def test_top_k_is_the_routers_even_where_the_config_says_otherwise() -> None:
    model = tiny_model("olmoe")
    model.config.num_experts_per_tok = 5  # type: ignore[union-attr]
    assert {layer.top_k for layer in find_moe_layers(model)} == {2}


def test_an_unknown_top_k_is_refused_by_the_layers_name() -> None:
    model: Any = tiny_model("olmoe")
    del model.get_submodule("model.layers.2.mlp.gate").top_k
    model.config = LlamaConfig()
    with pytest.raises(ValueError, match=r"top-k of model\.layers\.2\.mlp\.experts"):
        find_moe_layers(model)


def test_a_model_without_moe_layers_has_none() -> None:
    assert find_moe_layers(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict())) == []


def test_three_dimensional_weights_without_expert_ids_are_no_experts() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(4, 2, 2))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    assert find_moe_layers(Batched()) == []
