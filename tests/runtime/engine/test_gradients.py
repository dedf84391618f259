"""Gradients of an offloaded model are the stock model's, and nobody is told that experts train."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.autograd import forward_ad

import runtime
from tests.helpers.architectures import architecture_model, is_known
from tests.helpers.tiny import tiny_config, tiny_model

KINDS = ("olmoe", "mixtral", "qwen3_moe", "gpt_oss", "switch_transformers")
ODD = ("aria", "dbrx", "jetmoe", "llama4_text", "longcat_flash", "muse_spark", "nllb-moe",
       "nemotron_h", "step3p7")  # fmt: skip
"""One architecture of every other layout of experts."""
Directory = Callable[[str], Path]
Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _says_once_that_experts_are_constants() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the experts of an offloaded model")
        yield


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(2, 256, (2, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, seed: int = 0, **inputs: Any) -> Tensor:
    ids = token_ids(seed)
    loss: Tensor = model(input_ids=ids, labels=ids, **inputs).loss
    return loss


def gradients(model: Any, *, clear: bool = True) -> Gradients:
    """Of all parameters but the experts' that have one; they are cleared."""
    experts = (".experts.gate", ".experts.up", ".experts.down", ".expert_", ".fc1.", ".fc2.",
               "experts.mlp.", "input_linear.", "output_linear.")  # fmt: skip
    found = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not any(part in name for part in experts)
    }
    if clear:
        model.zero_grad()
    return found


def backward(model: Any, **inputs: Any) -> Gradients:
    loss_of(model, **inputs).backward()
    return gradients(model)


def assert_same(ours: Gradients, theirs: Gradients, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys() and len(theirs) > 3
    noise = 1e-3 * max(float(want.abs().max()) for want in theirs.values())
    for name, want in theirs.items():
        error = (ours[name] - want).abs().max() / want.abs().max().clamp(min=noise)
        assert error <= tolerance, name


# ---------------------------------------------------------------------- the stock model's


@pytest.mark.parametrize("memory", [0.25, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_stock_models(
    kind: str, memory: float, tiny_directory: Directory
) -> None:
    want = backward(tiny_model(kind))
    assert_same(backward(runtime.load(tiny_directory(kind), memory=memory)), want)
    with runtime.load(tiny_model(kind), memory=memory).expertflow as engine:
        assert_same(backward(engine.model), want)
        engine.check_integrity()


@pytest.mark.parametrize("kind", ODD)
def test_gradients_pass_every_layout_of_experts(kind: str) -> None:
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    model: Any = architecture_model(kind)
    weights = torch.linspace(-1, 1, 256)

    def run() -> Gradients:
        ids = token_ids()
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        output = model(input_ids=ids, **extra)
        (output.logits * weights[: output.logits.shape[-1]]).tanh().sum().backward()
        return gradients(model)

    want = run()
    runtime.load(model, memory=0.3)
    assert_same(run(), want, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_gradients_in_bfloat16_are_as_close_as_its_rounding(kind: str) -> None:
    exact = backward(tiny_model(kind))

    def error(model: Any) -> float:
        found = backward(model)
        return sum(
            float((found[name].float() - want).norm() / want.norm()) for name, want in exact.items()
        )

    stock = error(tiny_model(kind).to(torch.bfloat16))
    ours = error(runtime.load(tiny_model(kind).to(torch.bfloat16), memory=0.25))
    assert ours <= 1.25 * stock


def test_gradients_under_autocast_are_as_close_as_its_rounding() -> None:
    """The backward pass runs outside of autocast, as it should."""
    exact = backward(tiny_model("olmoe"))

    def error(model: Any) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        found = gradients(model)
        return sum(float((found[n] - want).norm() / want.norm()) for n, want in exact.items())

    stock, ours = error(tiny_model("olmoe")), error(runtime.load(tiny_model("olmoe"), memory=0.25))
    assert 0 < ours <= 1.25 * stock


def test_the_routers_auxiliary_loss_is_differentiated_too() -> None:
    def run(model: Any) -> Gradients:
        return backward(model, output_router_logits=True)

    want, without = run(tiny_model("mixtral")), backward(tiny_model("mixtral"))
    assert_same(run(runtime.load(tiny_model("mixtral"), memory=0.25)), want)
    name = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(want[name], without[name])


def test_the_saliency_of_input_embeddings_is_the_stock_models(tiny_directory: Directory) -> None:
    def run(model: Any) -> Tensor:
        embedded = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
        model(inputs_embeds=embedded).logits[:, -1].max(-1).values.sum().backward()
        assert embedded.grad is not None
        return embedded.grad

    model: Any = runtime.load(tiny_directory("olmoe"), memory=0.25)
    model.requires_grad_(False)
    torch.testing.assert_close(run(model), run(tiny_model("olmoe")), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe"])
def test_lora_on_attention_trains_as_on_the_stock_model(kind: str, when: str) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def train(offloads: bool) -> tuple[list[float], Gradients]:
        model: Any = tiny_model(kind)
        if offloads and when == "after":
            model = runtime.load(model, memory=0.25)
        torch.manual_seed(3)
        base, model = model, get_peft_model(model, config)
        if offloads and when == "before":
            runtime.load(base, memory=0.25)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
        for step in range(4):
            loss = loss_of(model, seed=step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, {name: p.detach().clone() for name, p in trained.items()}

    (ours, our_weights), (theirs, their_weights) = train(True), train(False)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_same(our_weights, their_weights, tolerance=1e-3)


def test_dropout_in_experts_is_the_stock_models_for_the_same_seed() -> None:
    def run(model: Any) -> tuple[float, Gradients]:
        torch.manual_seed(11)
        loss = loss_of(model.train())
        loss.backward()
        return loss.item(), gradients(model)

    options: dict[str, Any] = {"dropout_rate": 0.3}
    stock_loss, want = run(tiny_model("switch_transformers", **options))
    for memory in (0.25, 1.0):
        model = runtime.load(tiny_model("switch_transformers", **options), memory=memory)
        loss, got = run(model)
        assert loss == pytest.approx(stock_loss, abs=1e-5)
        assert_same(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_same_gradients(reentrant: bool) -> None:
    want = backward(tiny_model("olmoe"))
    model: Any = runtime.load(tiny_model("olmoe"), memory=0.25).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(backward(model), want)
    model.expertflow.check_integrity()


# ---------------------------------------------------------------------- any order of passes


def test_several_forward_passes_may_come_before_one_backward_pass() -> None:
    """Slots have long been filled with other experts."""

    def run(model: Any) -> Gradients:
        first, second = loss_of(model, seed=1), loss_of(model, seed=2)
        with torch.no_grad():
            loss_of(model, seed=3)
        (first + second).backward()
        return gradients(model)

    assert_same(run(runtime.load(tiny_model("olmoe"), memory=0.25)), run(tiny_model("olmoe")))


def test_slots_that_were_filled_in_inference_mode_serve_a_forward_pass_with_gradients() -> None:
    model = runtime.load(tiny_model("olmoe"), memory=1.0)
    with torch.inference_mode():
        loss_of(model)
    assert_same(backward(model), backward(tiny_model("olmoe")))


def test_a_graph_that_is_retained_gives_the_same_gradients_again() -> None:
    model = runtime.load(tiny_model("olmoe"), memory=0.25)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    assert_same(gradients(model), first, tolerance=0)


def test_a_backward_pass_in_another_thread_runs_beside_forward_passes() -> None:
    want, logits = backward(tiny_model("olmoe")), tiny_model("olmoe")(token_ids(5)).logits
    model: Any = runtime.load(tiny_model("olmoe"), memory=0.25)
    losses = [loss_of(model) for _ in range(3)]
    thread = threading.Thread(target=lambda: [loss.backward() for loss in losses])
    thread.start()
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(model(token_ids(5)).logits, logits, rtol=0, atol=1e-5)
    thread.join()
    assert_same({name: grad / 3 for name, grad in gradients(model).items()}, want)


def test_a_gradient_can_be_differentiated_again() -> None:
    def run(model: Any) -> Tensor:
        embedded = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        loss = model(inputs_embeds=embedded, labels=token_ids()).loss
        (grad,) = torch.autograd.grad(loss, embedded, create_graph=True)
        (again,) = torch.autograd.grad(grad.square().sum(), embedded)
        return again

    ours, theirs = run(runtime.load(tiny_model("olmoe"), memory=0.25)), run(tiny_model("olmoe"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_derivatives_in_forward_mode_are_the_stock_models() -> None:
    def run(model: Any) -> Tensor:
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        embedded = model.get_input_embeddings()(token_ids()).detach()
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
            tangent = forward_ad.unpack_dual(model(inputs_embeds=dual).logits).tangent
            assert tangent is not None
            return tangent

    ours, theirs = run(runtime.load(tiny_model("olmoe"), memory=0.25)), run(tiny_model("olmoe"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_function_transforms_are_refused() -> None:
    model: Any = runtime.load(tiny_model("olmoe"), memory=0.25)
    embedded = model.get_input_embeddings()(token_ids()).detach()
    for part in (model, model.model.layers[0].mlp):
        run = partial(part, inputs_embeds=embedded) if part is model else part
        with pytest.raises(ValueError, match=r"torch.func .* use autograd"):
            torch.vmap(lambda x, run=run: run(x))(embedded[:, None])
    with pytest.raises(ValueError, match=r"torch.func .* use autograd"):
        torch.func.grad(lambda x: model(inputs_embeds=x).logits.sum())(embedded)


def test_part_of_the_model_may_be_called_and_differentiated() -> None:
    def run(model: Any) -> Gradients:
        model.model(token_ids()).last_hidden_state.square().sum().backward()
        return gradients(model)

    assert_same(run(runtime.load(tiny_model("olmoe"), memory=0.25)), run(tiny_model("olmoe")))


def test_backward_after_detaching_is_refused() -> None:
    model = runtime.load(tiny_model("olmoe"), memory=0.25)
    loss = loss_of(model)
    model.expertflow.detach()
    with pytest.raises(ValueError, match="run backward first"):
        loss.backward()
    model.zero_grad()
    assert_same(backward(model), backward(tiny_model("olmoe")))


# ---------------------------------------------------------------------- experts are constants


def test_an_optimizer_that_holds_offloaded_experts_is_refused() -> None:
    model = tiny_model("olmoe")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = runtime.load(model, memory=0.25).expertflow
    loss_of(model).backward()
    with pytest.raises(ValueError, match=r"SGD holds .* experts .*detach"):
        optimizer.step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    engine.detach()
    optimizer.step()


def test_an_optimizer_may_hold_experts_that_were_frozen() -> None:
    model: Any = tiny_model("olmoe")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.model.requires_grad_(False)
    runtime.load(model, memory=0.25)
    loss_of(model).backward()
    optimizer.step()


def test_training_everything_says_once_that_experts_are_not_trained(
    tiny_directory: Directory,
) -> None:
    model = runtime.load(tiny_directory("olmoe"), memory=0.25)
    loss_of(model)  # nobody wants a gradient yet
    with pytest.warns(UserWarning, match="experts get none and are not trained"):
        loss_of(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model).backward()
        frozen: Any = runtime.load(tiny_directory("olmoe"), memory=0.25)
        frozen.model.embed_tokens.requires_grad_(False)
        loss_of(frozen).backward()


def test_a_graph_keeps_no_experts(tiny_directory: Directory) -> None:
    """A forward pass with gradients on keeps hidden states, whatever the size of an expert."""
    kept: list[int] = []
    for width in (24, 240):
        model = runtime.load(tiny_model("olmoe", intermediate_size=width), memory=0.25)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(model)
        kept.append(sum(sizes))
    assert tiny_config("olmoe").hidden_size == 32
    assert kept[0] == kept[1]
