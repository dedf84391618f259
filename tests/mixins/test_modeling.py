"""Every way to use a model, as transformers' ModelTesterMixin goes through them, beside stock."""

from __future__ import annotations

import copy
import io
import tempfile
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runtime
from tests.helpers.tiny import tiny_config, tiny_model
from tests.mixins.setting import (
    ARCHITECTURES,
    WAYS,
    Check,
    assert_gives,
    assert_same,
    offloaded,
    padded,
    stock,
    token_ids,
)


def outputs(model: Any, **options: Any) -> Any:
    """The output as a mapping, without its key/value cache."""
    with torch.no_grad():
        output = model(**(padded() | options))
    return {name: value for name, value in output.items() if name != "past_key_values"}


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def twice(model: Any) -> Any:
    return outputs(model), outputs(model)


def one_row_at_a_time(model: Any) -> Any:
    return [outputs(model, input_ids=row[None], attention_mask=None) for row in token_ids()]


def as_tuple(model: Any) -> Any:
    with torch.no_grad():
        return model(**padded(), use_cache=False, return_dict=False)


def from_embeddings(model: Any) -> Any:
    inputs = padded()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        return model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits


def base_model(model: Any) -> Tensor:
    """The model below the head, called by itself."""
    with torch.no_grad():
        return model.model(**padded()).last_hidden_state


def with_cache(model: Any) -> Any:
    """A prompt in three pieces over one cache."""
    ids_BT, cache, logits = token_ids(), None, []
    with torch.no_grad():
        for piece in ids_BT.split(3, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    return logits


def losses(model: Any) -> Any:
    inputs = padded()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    both = outputs(model, labels=labels, shift_labels=shifted)
    return [outputs(model, labels=labels)["loss"], both["loss"]]


def router_logits(model: Any) -> Any:
    labels = padded()["input_ids"]
    output = outputs(model, output_router_logits=True, labels=labels)
    model.config.output_router_logits = True
    return output, outputs(model)


def dense_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of what is not an expert's."""
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "experts" not in name
    }


def saliency(model: Any) -> Any:
    """Gradients of the embeddings, hidden states kept."""
    eager(model)
    embeddings = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
    output = model(inputs_embeds=embeddings, output_hidden_states=True, output_attentions=True)
    kept = [*output.hidden_states[1:], *output.attentions]
    for tensor in kept:
        tensor.retain_grad()
    output.logits.square().mean().backward()
    return [embeddings.grad, *(tensor.grad for tensor in kept)]


def freeze_experts(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.requires_grad_(False)


def training(model: Any, checkpointing: dict[str, Any] | None = None) -> Any:
    """Three steps of SGD on all but the experts."""
    freeze_experts(model)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(token_ids(), labels=token_ids(), use_cache=False).loss
        loss.backward()
        seen.append((loss.detach(), dense_gradients(model)))
        optimizer.step()
    return [loss for loss, _ in seen], seen[-1][1]


def input_gradients(model: Any) -> Any:
    """Gradients of the embedded tokens, where no parameter wants one."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *a: embedded.append(a[2]))
    logits = model(token_ids()).logits
    embedded[0].retain_grad()
    logits.square().mean().backward()
    hook.remove()
    model.disable_input_require_grads()
    return embedded[0].grad, outputs(model)


def larger_vocabulary(model: Any) -> Any:
    torch.manual_seed(5)
    model.resize_token_embeddings(300, mean_resizing=False)
    return outputs(model)["logits"][..., :256], model.config.vocab_size


def other_embeddings(model: Any) -> Any:
    replacement = nn.Embedding(256, 32)
    torch.manual_seed(6)
    nn.init.normal_(replacement.weight)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement
    return outputs(model)


def attention_of_choice(model: Any) -> Any:
    seen = []
    for name in ("eager", "sdpa"):
        with suppress(ValueError):  # gpt-oss has no sdpa
            model.set_attn_implementation(name)
        seen.append(outputs(model))
    return seen


def experts_of_choice(model: Any) -> Any:
    seen = []
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        seen.append(outputs(model))
    return seen


def kept_logits(model: Any) -> Any:
    return outputs(model, logits_to_keep=2), outputs(model, logits_to_keep=torch.tensor([3, 5]))


def positions(model: Any) -> Any:
    places = torch.arange(12).expand(3, -1) + 4
    return outputs(model, position_ids=places, attention_mask=None)


def automatic_mixed_precision(model: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return outputs(model)["logits"].shape


def in_inference_mode(model: Any) -> Any:
    with torch.inference_mode():
        return model(**padded()).logits.clone()


def hidden_states_of_layers(model: Any) -> Any:
    seen: list[Tensor] = []
    hook = model.model.layers[1].register_forward_hook(lambda *a: seen.append(a[2]))
    result = outputs(model)
    hook.remove()
    return seen, result


def counted(model: Any) -> Any:
    """Sizes that a caller asks for: of what is not an expert's."""
    embedding = model.get_input_embeddings().weight
    return embedding.shape, model.get_output_embeddings().weight.shape, model.dtype, model.device


def by_keyword(model: Any) -> Any:
    with torch.no_grad():
        return model(padded()["input_ids"], padded()["attention_mask"]).logits


def under_data_parallel(model: Any) -> Any:
    with torch.no_grad():
        return nn.DataParallel(model)(**padded()).logits


def as_a_part(model: Any) -> Any:
    """Inside of another module."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits

    with torch.no_grad():
        return Whole().eval()(token_ids())


def compiled(model: Any) -> Any:
    with torch.no_grad():
        return torch.compile(model, backend="eager")(token_ids(), use_cache=False).logits


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    with torch.no_grad():
        return model(token_ids(), use_cache=False).logits


CHECKS: dict[str, Check] = {
    "outputs": outputs,
    "deterministic": twice,
    "one row at a time": one_row_at_a_time,
    "a tuple": as_tuple,
    "hidden states": lambda model: outputs(model, output_hidden_states=True),
    "attentions": lambda model: outputs(eager(model), output_attentions=True),
    "embeddings": from_embeddings,
    "base model": base_model,
    "pieces over a cache": with_cache,
    "losses": losses,
    "router logits": router_logits,
    "saliency": saliency,
    "training": training,
    "training, reentrant checkpoints": lambda m: training(m, {"use_reentrant": True}),
    "training, checkpoints": lambda m: training(m, {"use_reentrant": False}),
    "gradients of inputs": input_gradients,
    "a larger vocabulary": larger_vocabulary,
    "other embeddings": other_embeddings,
    "attention of choice": attention_of_choice,
    "experts of choice": experts_of_choice,
    "logits to keep": kept_logits,
    "positions": positions,
    "mixed precision": automatic_mixed_precision,
    "inference mode": in_inference_mode,
    "hidden states of layers": hidden_states_of_layers,
    "counted": counted,
    "by position": by_keyword,
    "data parallel": under_data_parallel,
    "a part of a module": as_a_part,
    "torch.compile": compiled,
    "model.compile": compiled_in_place,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CHECKS)
def test_the_model_does_what_the_stock_model_does(name: str, architecture: str, way: str) -> None:
    check = CHECKS[name]
    assert_gives(check, architecture, way, check(stock(architecture)))


def saved(model: Any) -> Any:
    model.save_pretrained(tempfile.mkdtemp())


CHANGES: dict[str, tuple[Check, str]] = {
    "save_pretrained": (saved, "without its experts"),
    "torch.save": (lambda model: torch.save(model, io.BytesIO()), "expert"),
    "values of a state_dict": (
        lambda model: [value.clone() for value in model.state_dict().values()],
        "expert",
    ),
    "load_state_dict": (
        lambda model: model.load_state_dict(tiny_model("olmoe").state_dict(), strict=False),
        "expert",
    ),
    "deepcopy": (copy.deepcopy, "cop"),
    "half": (lambda model: model.half(), "dtype"),
    "bfloat16": (lambda model: model.to(torch.bfloat16), "dtype"),
}
"""Ways to change, copy or save a model that are refused by name, and a piece of the message."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_would_lose_experts_are_refused(
    name: str, architecture: str, way: str
) -> None:
    model, (change, message) = offloaded(architecture, way), CHANGES[name]
    expected = outputs(model)
    with pytest.raises(ValueError, match=message):
        change(model)
    assert_same(outputs(model), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_detached_model_saves_and_loads_as_the_stock_model(architecture: str) -> None:
    model, folder = offloaded(architecture, "directory"), tempfile.mkdtemp()
    model.expertflow.detach().save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    expected = stock(architecture)
    assert_same(dict(again.state_dict()), dict(expected.state_dict()))
    assert_same(outputs(runtime.load(folder, memory=0.25)), outputs(expected))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_classifier_is_exact_too(architecture: str) -> None:
    from transformers import AutoModelForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(3)
        config = tiny_config(architecture, num_labels=3)
        return AutoModelForSequenceClassification.from_config(config).eval()

    labels = torch.tensor([0, 2, 1])
    expected = outputs(classifier(), labels=labels)
    assert_same(outputs(runtime.load(classifier(), memory=0.25), labels=labels), expected)
