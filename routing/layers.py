"""The MoE layers of a Hugging Face model: finding them, and reading their experts calls.

In transformers 5 nearly every MoE makes the same call, `experts(hidden_TH, ids_TK, weights_TK)`.
Discovery, recording and offloading all build on that call; `routing.containers` has the layouts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from routing.containers import CONTAINERS, MoELayer, Routes

__all__ = ["MoELayer", "Routes", "by_stack", "find_moe_layers", "read_call", "read_routes"]

TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")
"""Attributes that hold a router's top-k."""
TOP_K = {"switch": 1, "nllb": 2}
"""Top-k of the kinds whose routers do not have it as an attribute."""

KINDS = {
    "SwitchTransformersExperts": "switch",
    "NllbMoeExperts": "nllb",
    "DbrxExperts": "dbrx",
    "Llama4TextExperts": "llama4",
    "JetMoeMoE": "jetmoe",
    "LongcatFlashExperts": "longcat",
}
"""Experts classes of another layout than "fused"."""

UNSUPPORTED = {
    "DogeCDMoE": "its experts are single rows of embeddings, too small to be worth moving",
    "FP8Experts": "its experts are quantised; give runtime.load its directory, or load it with "
    "FineGrainedFP8Config(dequantize=True)",
    "Mxfp4GptOssExperts": "its experts are quantised; give runtime.load its directory, or load it "
    "with Mxfp4Config(dequantize=True)",
}
"""Experts classes that are refused -> the reason."""


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers in execution order; an empty list without any.

    Raises ValueError, naming the class, for experts that ExpertFlow does not support.
    """
    layers = []
    for name, module in model.named_modules():
        reason = UNSUPPORTED.get(type(module).__name__)
        if reason is not None:
            raise ValueError(f"{type(module).__name__} ({name}) is not supported: {reason}")
        kind = _kind(module)
        if kind is not None:
            layers.append(_describe(model, name, module, kind))
    return layers


def _kind(module: nn.Module) -> str | None:
    name = type(module).__name__
    if name == "AriaExperts" and hasattr(module, "fc1"):
        return "aria"
    return KINDS.get(name) or ("fused" if _is_fused(module) else None)


def _is_fused(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    down_proj = parameters.get("down_proj")
    if down_proj is None or down_proj.dim() != 3:
        return False
    return len(inspect.signature(type(module).forward).parameters) >= 4


def _describe(model: nn.Module, name: str, module: nn.Module, kind: str) -> MoELayer:
    encoder = bool(getattr(model.config, "is_encoder_decoder", False)) and "encoder" in name.split(
        "."
    )
    return MoELayer(
        name=name,
        module=module,
        kind=kind,
        stack="encoder" if encoder else "decoder",
        num_experts=CONTAINERS[kind].num_experts(module),
        top_k=TOP_K.get(kind) or _top_k(model, name),
    )


def _top_k(model: nn.Module, name: str) -> int:
    """The router's top-k: looked up in and beside the experts, then in the configuration."""
    module, block = (model.get_submodule(path) for path in (name, name.rpartition(".")[0]))
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    for owner in (*module.children(), block, *block.children(), config):
        for attribute in TOP_K_NAMES:
            value = getattr(owner, attribute, None)
            if isinstance(value, int):
                return value
    raise ValueError(
        f"the top-k of {name} is unknown: no {' or '.join(TOP_K_NAMES)} beside it or in the config"
    )


def read_routes(layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routes:
    """The router's decision for every token, from the arguments of `layer`'s experts call.

    Never read off router logits: selection bias and group limits make the top-k of the logits
    differ from the experts that run.
    """
    return layer.container.routes(layer, bound_call(layer, args, kwargs))


def read_call(
    layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Routes]:
    """The hidden states [..., H] of `layer`'s experts call, and the experts of each row."""
    arguments = bound_call(layer, args, kwargs)
    hidden: Tensor = arguments[0]
    return hidden, layer.container.rows(layer, arguments)


def bound_call(layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the experts call, in the order of its signature."""
    if not kwargs:
        return args
    signature = inspect.signature(type(layer.module).forward)
    return tuple(signature.bind(layer.module, *args, **kwargs).arguments.values())[1:]


def by_stack(layers: list[MoELayer]) -> Iterator[tuple[str, list[MoELayer]]]:
    """The layers grouped by stack, each in execution order."""
    for name in dict.fromkeys(layer.stack for layer in layers):
        yield name, [layer for layer in layers if layer.stack == name]
