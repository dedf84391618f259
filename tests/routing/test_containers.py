"""routing.containers: routes of architectures whose experts calls hold them indirectly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routing.layers import MoELayer, Routes, find_moe_layers, read_routes
from routing.topology import NO_EXPERT
from tests.helpers.architectures import OVERRIDES, architecture_model

TOKENS = torch.arange(2, 26).view(2, 12)


def calls(model: nn.Module, router: str) -> list[tuple[MoELayer, Routes, Tensor]]:
    """Each layer with its routes and its router's input in one pass."""
    routes: dict[str, Routes] = {}
    inputs: dict[str, Tensor] = {}
    layers = find_moe_layers(model)

    def read(layer: MoELayer) -> Any:
        return lambda _, args, kwargs: routes.update({layer.name: read_routes(layer, args, kwargs)})

    for layer in layers:
        block = model.get_submodule(layer.name.removesuffix(".experts"))
        layer.module.register_forward_pre_hook(read(layer), with_kwargs=True)
        block.get_submodule(router).register_forward_pre_hook(
            lambda _, args, name=layer.name: inputs.update({name: args[0].flatten(0, -2)})
        )
    decoder = {"decoder_input_ids": TOKENS[:, :5]} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    with torch.no_grad():
        model(input_ids=TOKENS, **decoder)
    return [(layer, routes[layer.name], inputs[layer.name]) for layer in layers]


def chosen(weight: Tensor, hidden_TH: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top-k of a plain linear router: logits and ids."""
    return (hidden_TH @ weight.detach().T).topk(top_k, dim=-1)


def assert_same_experts(ours_TK: Tensor, theirs_TK: Tensor) -> None:
    assert torch.equal(ours_TK.sort(-1).values, theirs_TK.sort(-1).values)


@pytest.fixture
def two_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 with two experts a token, not one."""
    monkeypatch.setitem(OVERRIDES, "llama4_text", {"num_experts_per_tok": 2})


def test_llama4_routes_are_read_off_the_rows_that_are_not_zero(two_experts: None) -> None:
    model: Any = architecture_model("llama4_text")
    for layer, routes, hidden_TH in calls(model, "router"):
        router = model.get_submodule(layer.name.removesuffix("experts") + "router")
        assert_same_experts(routes.experts_TK, chosen(router.weight, hidden_TH, 2)[1])
        assert (routes.weights_TK == 1).all()


def test_a_llama4_score_of_zero_is_no_expert(two_experts: None) -> None:
    (layer, *_) = find_moe_layers(architecture_model("llama4_text"))
    hidden_ETH = torch.zeros(8, 2, 32)
    hidden_ETH[5, 0] = hidden_ETH[1, 1] = hidden_ETH[2, 1] = 1
    routes = read_routes(layer, (hidden_ETH.flatten(0, 1),), {})
    assert [sorted(row) for row in routes.experts_TK.tolist()] == [[NO_EXPERT, 5], [1, 2]]


def test_jetmoe_routes_are_its_routers() -> None:
    model: Any = architecture_model("jetmoe")
    for layer, routes, hidden_TH in calls(model, "router"):
        weight = layer.module.get_parameter("router.layer.weight")
        logits_TK, experts_TK = chosen(weight, hidden_TH, 2)
        assert torch.equal(routes.experts_TK, experts_TK)
        torch.testing.assert_close(routes.weights_TK, logits_TK.softmax(-1))


def test_dbrx_routes_are_its_routers() -> None:
    model: Any = architecture_model("dbrx")
    for layer, routes, hidden_TH in calls(model, "router"):
        router = model.get_submodule(layer.name.removesuffix("experts") + "router")
        assert_same_experts(routes.experts_TK, chosen(router.layer.weight, hidden_TH, 2)[1])


def test_nllb_routes_are_its_routers_though_transformers_runs_other_experts() -> None:
    model: Any = architecture_model("nllb-moe")
    for layer, routes, hidden_TH in calls(model, "router"):
        router = model.get_submodule(layer.name.removesuffix("experts") + "router")
        logits_TK, experts_TK = chosen(router.classifier.weight, hidden_TH, 2)
        kept_TK = routes.experts_TK != NO_EXPERT
        assert kept_TK.any(-1).float().mean() > 0.5
        assert torch.equal(routes.experts_TK[kept_TK], experts_TK[kept_TK])
        both_T = kept_TK.all(-1)
        expected_TK = logits_TK.softmax(-1)[both_T]
        torch.testing.assert_close(routes.weights_TK[both_T], expected_TK)


@pytest.mark.parametrize("kind", ["dbrx", "llama4_text", "jetmoe", "nllb-moe", "longcat_flash"])
def test_every_parameter_of_the_experts_belongs_to_one_expert(kind: str) -> None:
    from runtime.weights.store import expert_parameters, expert_part

    for layer in find_moe_layers(architecture_model(kind)):
        names = layer.container.names(layer.module)
        parameters = expert_parameters(layer)
        for name in names:
            for tensor in parameters.values():
                tensor.data.zero_()
            for expert in range(layer.num_experts):
                expert_part(layer, names, parameters, expert)[name].data.add_(1)
            touched = {layer.container.path(name, e) for e in range(layer.num_experts)}
            for path in touched:
                rows = layer.num_experts if kind == "longcat_flash" else None
                assert (parameters[path][:rows] == 1).all()
