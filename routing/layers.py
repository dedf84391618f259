"""The MoE layers of a Hugging Face model: where they are, and what the experts call says.

transformers 5 gives nearly every MoE the same call, `experts(hidden_TH, ids_TK, weights_TK)`, so
discovery, recording and offloading all hang on that one call. Two layouts are handled:

    kind     experts container                                  called with
    fused    one module, parameters with a leading E dimension  hidden_TH, ids_TK, weights_TK
    switch   ModuleDict `expert_0` ... `expert_{E-1}`           hidden_TH, onehot_T1E, weights_T1
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from routing.topology import NO_EXPERT

TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")

UNSUPPORTED = {
    "DbrxExperts": "all experts share two-dimensional weights",
    "LongcatFlashExperts": "some of its experts have no parameters",
    "Llama4TextExperts": "its experts are called densely, without expert ids",
    "JetMoeParallelExperts": "its experts are called with counts, without expert ids",
    "AriaGroupedExpertsGemm": "its experts are called with counts, without expert ids",
    "NllbMoeExperts": "its experts forward in transformers runs experts other than those routed to",
}
"""Experts classes that are refused by name, and why."""


class MoELayer(NamedTuple):
    """One MoE layer of a live model."""

    name: str
    """Module path of the experts container."""
    module: nn.Module
    kind: str
    """"fused" or "switch"."""
    stack: str
    """"encoder" or "decoder"."""
    num_experts: int
    top_k: int


class Routes(NamedTuple):
    """What one experts call was asked to do."""

    experts_TK: Tensor
    """int64; NO_EXPERT where a token was dropped by capacity or sent to a parameter-free expert."""
    weights_TK: Tensor


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The model's MoE layers in execution order; empty when it has none.

    Raises ValueError for an experts class that ExpertFlow does not handle, naming it.
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
    if isinstance(module, nn.ModuleDict):
        return "switch" if type(module).__name__ == "SwitchTransformersExperts" else None
    return "fused" if _is_fused(module) else None


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
        num_experts=len(module) if isinstance(module, nn.ModuleDict) else len(module.down_proj),  # type: ignore[arg-type]
        top_k=1 if kind == "switch" else _top_k(model, name),
    )


def _top_k(model: nn.Module, name: str) -> int:
    """Top-k is the router's: look beside the experts first, then in the configuration."""
    block = model.get_submodule(name.rpartition(".")[0])
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    for owner in (block, *block.children(), config):
        for attribute in TOP_K_NAMES:
            value = getattr(owner, attribute, None)
            if isinstance(value, int):
                return value
    raise ValueError(
        f"cannot tell the top-k of {name}: no {' or '.join(TOP_K_NAMES)} beside it or in the config"
    )


def read_routes(layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routes:
    """Expert ids and weights from the arguments of `layer`'s experts call.

    Read here and never from router logits: selection bias and group limits make the top-k of the
    logits differ from the experts that run.
    """
    return read_call(layer, args, kwargs)[1]


def read_call(
    layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Routes]:
    """The hidden states [T, H] of `layer`'s experts call, and its routes."""
    hidden, index, weights = bound_call(layer, args, kwargs)
    return hidden, _routes(layer, index, weights)


def _routes(layer: MoELayer, index: Tensor, weights: Tensor) -> Routes:
    if layer.kind == "switch":
        chosen_TE = index[:, 0]
        experts_T = torch.where(chosen_TE.sum(-1) > 0, chosen_TE.argmax(-1), NO_EXPERT)
        return Routes(experts_T[:, None], weights)
    return Routes(torch.where(index < layer.num_experts, index, NO_EXPERT), weights)


def bound_call(
    layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts call's hidden states, ids and weights, as the model gave them."""
    if len(args) >= 3:
        return args[0], args[1], args[2]
    signature = inspect.signature(type(layer.module).forward)
    hidden, index, weights = list(signature.bind(layer.module, *args, **kwargs).arguments.values())[
        1:4
    ]
    return hidden, index, weights


def by_stack(layers: list[MoELayer]) -> Iterator[tuple[str, list[MoELayer]]]:
    """The layers grouped by stack, each in execution order."""
    for name in dict.fromkeys(layer.stack for layer in layers):
        yield name, [layer for layer in layers if layer.stack == name]
