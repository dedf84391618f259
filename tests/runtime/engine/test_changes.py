"""Changes to an offloaded model: each has the stock model's result, or is refused at the call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runtime
from tests.helpers.offloading import check, generate, logits, offload
from tests.helpers.tiny import tiny_model

Change = Callable[[Any], Any]
Directory = Callable[[str], Path]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
]

OTHER = 5
"""The seed of another model of the same shape."""


def experts(model: Any, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp.experts


def dense_weights(model: Any) -> dict[str, Tensor]:
    other: Any = tiny_model("olmoe", OTHER)
    return {name: value for name, value in other.state_dict().items() if "experts" not in name}


def hooked(model: Any) -> None:
    for module in (
        experts(model),
        model.model.layers[0].mlp,
        model.model.layers[1].self_attn.o_proj,
    ):
        module.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
        module.register_forward_hook(lambda _, __, output: output * 1.5, always_call=True)


def own_forward(path: str) -> Change:
    def change(model: Any) -> None:
        module = model.get_submodule(path)
        stock = module.forward
        module.forward = lambda *args, **kwargs: stock(*args, **kwargs) * -2

    return change


def own_model_forward(model: Any) -> None:
    stock = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        output.logits = -output.logits
        return output

    model.forward = forward


def more_experts_a_token(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 4


EXACT: dict[str, Change] = {
    "to its own dtype": lambda model: model.to(torch.float32),
    "to its own device": lambda model: model.cpu(),
    "float32 again": lambda model: model.float(),
    "shared memory": lambda model: model.share_memory(),
    "dense weights": lambda model: model.load_state_dict(dense_weights(model), strict=False),
    "its own state dict": lambda model: model.load_state_dict(model.state_dict()),
    "a state dict assigned": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "a weight in place": lambda model: model.model.layers[0].mlp.gate.weight.data.mul_(-1),
    "a new weight": lambda model: setattr(
        model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().flip(0))
    ),
    "fewer layers": lambda model: setattr(model.model, "layers", model.model.layers[:2]),
    "another MoE block": lambda model: setattr(
        model.model.layers[0], "mlp", tiny_model("olmoe", OTHER).get_submodule("model.layers.0.mlp")
    ),
    "more tokens": lambda model: model.resize_token_embeddings(300, mean_resizing=False),
    "tied weights": lambda model: model.tie_weights(),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
    "eager experts": lambda model: model.set_experts_implementation("eager"),
    "training": lambda model: model.train(),
    "checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "embedding gradients": lambda model: model.enable_input_require_grads(),
    "frozen": lambda model: model.requires_grad_(False),
    "initialised anew": lambda model: model.init_weights(),
    "a top-k of the config": lambda model: setattr(model.config, "num_experts_per_tok", 4),
    "a top-k of the routers": more_experts_a_token,
    "hooks": hooked,
    "a forward of the experts": own_forward("model.layers.0.mlp.experts"),
    "a forward of attention": own_forward("model.layers.0.self_attn.o_proj"),
    "a forward of the model": own_model_forward,
}


@pytest.mark.parametrize("change", EXACT.values(), ids=EXACT)
def test_a_change_has_the_stock_models_result(change: Change) -> None:
    stock: Any = tiny_model("olmoe")
    model = offload(tiny_model("olmoe"))
    for one in (stock, model):
        torch.manual_seed(3)
        change(one)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-5)
    assert torch.equal(generate(model), generate(stock))
    assert model.expertflow.stats().steps == 9
    check(model)


REFUSED: dict[str, tuple[Change, str]] = {
    "half": (lambda model: model.half(), r"stays torch.float32 .* torch.float16 .* dtype="),
    "bfloat16": (lambda model: model.bfloat16(), "stays torch.float32"),
    "double": (lambda model: model.double(), "stays torch.float32"),
    "to a dtype": (lambda model: model.to(torch.float64), "stays torch.float32"),
    "to meta": (lambda model: model.to("meta"), "on meta; load it with dtype= and device="),
    "type": (lambda model: model.type(torch.float64), "stays torch.float32"),
    "half the decoder": (lambda model: model.model.half(), "stays torch.float32"),
    "half a layer": (lambda model: model.model.layers[0].half(), "stays torch.float32"),
    "half the experts": (lambda model: experts(model).half(), "stays torch.float32"),
    "empty": (lambda model: model.to_empty(device="cpu"), "cannot be emptied"),
    "an empty layer": (
        lambda model: model.model.layers[0].to_empty(device="cpu"), "cannot be emptied",
    ),
    "data of another dtype": (
        lambda model: setattr(experts(model).down_proj, "data", experts(model).down_proj.half()),
        r"layers.0.mlp.experts.down_proj is offloaded: .*detach\(\) first",
    ),
    "an expert in place": (
        lambda model: experts(model).down_proj.data.mul_(2), "neither read nor changed",
    ),
    "an initialised expert": (
        lambda model: nn.init.zeros_(experts(model).down_proj), "neither read nor changed",
    ),
    "an expert by index": (
        lambda model: experts(model).down_proj.__setitem__(0, 1), "neither read nor changed",
    ),
    "a new expert": (
        lambda model: setattr(experts(model), "down_proj", nn.Parameter(torch.zeros(8, 32, 24))),
        "experts.down_proj cannot be replaced",
    ),
    "no expert": (lambda model: delattr(experts(model), "down_proj"), "cannot be replaced"),
    "another activation": (
        lambda model: setattr(experts(model), "act_fn", nn.GELU()), "act_fn cannot be replaced",
    ),
    "other experts": (
        lambda model: setattr(
            model.model.layers[0].mlp, "experts", experts(tiny_model("olmoe", OTHER))
        ),
        r"mlp.experts cannot be replaced",
    ),
    "gradients of experts": (lambda model: model.requires_grad_(True), "takes no gradient"),
    "another state dict": (
        lambda model: model.load_state_dict(tiny_model("olmoe", OTHER).state_dict()),
        "state dict has values for model.layers.0.mlp.experts",
    ),
    "another state dict, not strict": (
        lambda model: model.load_state_dict(tiny_model("olmoe", OTHER).state_dict(), strict=False),
        "state dict has values for",
    ),
    "another state dict, assigned": (
        lambda model: model.load_state_dict(tiny_model("olmoe", OTHER).state_dict(), assign=True),
        "state dict has values for",
    ),
    "a layer's state dict": (
        lambda model: model.model.layers[1].load_state_dict(
            tiny_model("olmoe", OTHER).get_submodule("model.layers.1").state_dict()
        ),
        r"state dict has values for model.layers.1.mlp.experts",
    ),
    "another offloaded model's": (
        lambda model: model.load_state_dict(offload(tiny_model("olmoe", OTHER)).state_dict()),
        "state dict has values for",
    ),
    "a parametrised expert": (
        lambda model: nn.utils.parametrize.register_parametrization(
            experts(model), "down_proj", nn.Identity()
        ),
        "offloaded",
    ),
    "a normalised expert": (
        lambda model: nn.utils.weight_norm(experts(model), "down_proj"), "offloaded",
    ),
    "dynamic quantisation": (
        lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
        "neither copied nor pickled",
    ),
    "other weights in a call": (
        lambda model: torch.func.functional_call(
            model, dict(tiny_model("olmoe", OTHER).named_parameters()), (torch.tensor([[2, 3]]),)
        ),
        "cannot be replaced",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_change_that_would_not_reach_the_experts_is_refused_and_nothing_is_lost(
    change: Change, message: str
) -> None:
    stock: Any = tiny_model("olmoe")
    model = offload(tiny_model("olmoe"))
    with pytest.raises(ValueError, match=message):
        change(model)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-5)
    assert torch.equal(generate(model), generate(stock))
    detached = model.expertflow.detach()
    assert torch.equal(logits(detached), logits(stock))


@pytest.mark.parametrize("change", [REFUSED["half"][0], REFUSED["an expert in place"][0]])
def test_a_model_from_a_directory_refuses_too(change: Change, tiny_directory: Directory) -> None:
    model = runtime.load(tiny_directory("olmoe"), memory=0.25)
    before = logits(model)
    with pytest.raises(ValueError, match="offloaded"):
        change(model)
    assert torch.equal(logits(model), before)


def test_experts_that_are_modules_cannot_be_changed_one_by_one() -> None:
    model: Any = offload(tiny_model("switch_transformers"))
    before = logits(model)
    expert = model.decoder.block[0].layer[-1].mlp.experts["expert_3"]
    for change in (
        lambda: expert.half(),
        lambda: setattr(expert, "wi", nn.Linear(32, 24, bias=False)),
        lambda: expert.wo.weight.data.zero_(),
        lambda: copy.deepcopy(expert),
    ):
        with pytest.raises(ValueError, match="offloaded"):
            change()
    assert torch.equal(logits(model), before)


def test_a_missing_expert_is_missed_as_in_the_stock_model() -> None:
    model, stock = offload(tiny_model("olmoe")), tiny_model("olmoe")
    dense = dense_weights(model)
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.gate_up_proj"):
        model.load_state_dict(dense)
    ours, theirs = (one.load_state_dict(dense, strict=False) for one in (model, stock))
    assert ours == theirs and ours.missing_keys


def test_a_change_before_loading_is_the_models_own() -> None:
    """Also of an expert: its tensors are what the slots are filled from."""
    stock: Any = tiny_model("olmoe")
    experts(stock).gate_up_proj.data.mul_(2)
    model: Any = tiny_model("olmoe")
    experts(model).gate_up_proj.data.mul_(2)
    hooked(stock)
    hooked(model)
    torch.testing.assert_close(logits(offload(model)), logits(stock), rtol=0, atol=1e-5)


def test_a_hook_on_the_experts_can_be_removed() -> None:
    model = offload(tiny_model("olmoe"))
    expected = logits(model)
    handle = experts(model).register_forward_hook(lambda _, __, output: output * 2)
    assert not torch.equal(logits(model), expected)
    handle.remove()
    assert torch.equal(logits(model), expected)


def test_a_detached_model_can_be_changed_again() -> None:
    model, stock = tiny_model("olmoe"), tiny_model("olmoe").bfloat16()
    assert torch.equal(logits(offload(model).expertflow.detach().bfloat16()), logits(stock))
    experts(model).down_proj = nn.Parameter(torch.zeros(8, 32, 24, dtype=torch.bfloat16))
    assert experts(model).down_proj.requires_grad


def test_an_expert_that_is_changed_behind_the_engines_back_is_noticed_at_its_next_load() -> None:
    model: Any = tiny_model("olmoe")
    kept = experts(model).down_proj
    offload(model, None)
    logits(model)
    with torch.no_grad():
        kept.mul_(2)
    with pytest.raises(ValueError, match="changed while they are offloaded"):
        logits(model)
    stock: Any = tiny_model("olmoe")
    experts(stock).down_proj.data.mul_(2)
    assert torch.equal(logits(model.expertflow.detach()), logits(stock))
    torch.testing.assert_close(logits(offload(model)), logits(stock), rtol=0, atol=1e-5)
