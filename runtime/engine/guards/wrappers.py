"""The model inside what is passed to `runtime.load`, or a refusal that names the remedy."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from routing.layers import MoELayer, find_moe_layers
from runtime.engine.guards.placeholder import Placeholder


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, or the one inside a PEFT model: that is what gets the engine.

    Raises ValueError for any other wrapper, and for a model whose experts are not the stock
    model's own: dispatched by accelerate, adapted, reparametrised, or with another forward.
    """
    base = _unwrapped(model)
    _refuse_offloaded(base)
    _refuse_scattered(base)
    for layer in find_moe_layers(base):
        _refuse_changed(base, layer)
    return base


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, PreTrainedModel):
        return model
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            if _is_peft(model):
                return module
            raise ValueError(
                f"{type(model).__name__} is a wrapper: offload the model first, "
                f"runtime.load(model), and wrap it after (here it is wrapper.{name})"
            )
    raise ValueError(f"{type(model).__name__} is not a model of transformers")


def _refuse_offloaded(model: nn.Module) -> None:
    if "expertflow" in model.__dict__:
        raise ValueError("this model is offloaded already; call model.expertflow.detach() first")
    if any(isinstance(parameter, Placeholder) for parameter in model.parameters()):
        raise ValueError("this model's engine is closed and its experts are gone; load it again")


def _refuse_scattered(model: nn.Module) -> None:
    """Raise ValueError for a model whose weights are not all in memory."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            "accelerate has dispatched this model (device_map=, cpu_offload, disk_offload), and "
            "moves its weights by itself; load it without device_map, or pass its directory to "
            "runtime.load"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device and has no values; load the model's weights, or "
                "pass its directory to runtime.load"
            )


def _refuse_changed(model: nn.Module, layer: MoELayer) -> None:
    """Raise ValueError where the experts of a layer are not the stock model's own."""
    for name, module in layer.module.named_modules(prefix=layer.name):
        if "forward" in module.__dict__:
            raise ValueError(
                f"{name} has a forward of its own, which would not run while its experts are "
                f"offloaded; delete it (del model.{name}.forward), and put it on after loading"
            )
        norms = [type(hook).__module__ for hook in module._forward_pre_hooks.values()]
        if hasattr(module, "parametrizations") or any(map(_is_torchs, norms)):
            raise ValueError(
                f"{name} is parametrised, and its parameters are made anew in every call; remove "
                "that first, with torch.nn.utils.parametrize.remove_parametrizations or "
                "torch.nn.utils.remove_weight_norm"
            )
    for name, module in (*_ancestors(model, layer.name), *_within(layer)):
        if _is_peft(module):
            raise ValueError(
                f"an adapter holds the experts of {layer.name} ({type(module).__name__} {name}); "
                "call merge_and_unload() first, or adapt other modules, such as attention"
            )


def _ancestors(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    names = path.split(".")
    for length in range(1, len(names)):
        name = ".".join(names[:length])
        yield name, model.get_submodule(name)


def _within(layer: MoELayer) -> Iterator[tuple[str, nn.Module]]:
    yield from layer.module.named_modules(prefix=layer.name)


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def _is_torchs(module: str) -> bool:
    return module.startswith("torch.nn.utils")
