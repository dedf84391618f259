"""The expert layouts that kernels can run, recognised by trying, not by the names of classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from routing.layers import MoELayer
from runtime.cuda.kernels.coded import reason_against
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.coded import Coding
from runtime.weights.source import Source

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu")
"""In the order of the kernels' constants."""


@dataclass(frozen=True, kw_only=True)
class KernelLayout:
    """The way kernels read a gated expert's parameters."""

    hidden: int
    """H"""
    width: int
    """I, rows of the gate (and of the up) projection."""
    activation: str
    alternating: bool
    """Gate and up rows alternate, instead of gate first, then up."""
    transposed: bool
    """The model keeps its weights [in, out]; slots and host tier keep [out, in]."""
    has_bias: bool
    dtype: torch.dtype


def common_layout(source: Source) -> KernelLayout | str:
    """How the kernels read all of a model's experts, or why they cannot."""
    config: Any = source.model.config
    if config.is_encoder_decoder:
        return "encoder-decoder models are not captured"
    if len(source.groups) > 1:
        shapes = [group.specs for group in source.groups]
        several = "shapes" if any(one != shapes[0] for one in shapes) else "encodings"
        return f"its layers have experts of several {several}"
    coding = source.groups[0].coding
    found = [
        layout_of(layer, source.store.specs(index), coding)
        for index, layer in enumerate(source.layers)
    ]
    return found[0] if len(set(found)) == 1 else "its layers have experts of several kinds"


def layout_of(layer: MoELayer, specs: Specs, coding: Coding | None = None) -> KernelLayout | str:
    """The layout of `layer`'s experts, or why the kernels cannot run them."""
    module: Any = layer.module
    names = {"gate_up_proj", "down_proj"}
    biased = names | {f"{name}_bias" for name in names}
    if layer.kind != "fused" or set(specs) not in (names, biased):
        return f"experts with parameters {', '.join(sorted(specs))} have no kernel"
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__name__} is not a plain gated expert"
    dtypes = {spec.dtype for spec in specs.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"no kernel for experts in {', '.join(map(str, dtypes))}"
    found = _activation(module)
    if found is None:
        return f"the activation of {type(module).__name__} has no kernel"
    if coding and (reason := _reason_against(coding, bool(module.is_transposed))):
        return reason
    shape = specs["down_proj"].shape
    width, hidden = shape if module.is_transposed else shape[::-1]
    return KernelLayout(
        hidden=hidden,
        width=width,
        activation=found[0],
        alternating=found[1],
        transposed=bool(module.is_transposed),
        has_bias=set(specs) == biased,
        dtype=dtypes.pop(),
    )


def _reason_against(coding: Coding, transposed: bool) -> str | None:
    """Why no kernel decodes the matrices of an expert; None where kernels do."""
    for name in ("gate_up_proj", "down_proj"):
        matrix = coding.get(name)
        if matrix is None:
            return f"{name} is not in codes, as the experts' other matrix is"
        if matrix.transposed != transposed:
            return f"the codes of {name} lie across the rows that kernels read"
        if reason := reason_against(matrix):
            return reason
    return None


def block_of(specs: Specs, coding: Coding, layout: KernelLayout | None) -> ExpertBlock:
    """The blocks of experts with such parameters: where kernels run them, weights are [out, in]."""
    if layout is not None:
        coding = {name: matrix._replace(transposed=False) for name, matrix in coding.items()}
    return ExpertBlock(stored_specs(specs, layout), coding=coding)


def stored_specs(specs: Specs, layout: KernelLayout | None) -> Specs:
    """The shapes as the host tier and the slots keep them: weights [out, in]."""
    if layout is None or not layout.transposed:
        return specs
    return {name: Spec(spec.shape[::-1], spec.dtype) for name, spec in specs.items()}


def as_model(parameters: dict[str, Tensor], layout: KernelLayout) -> dict[str, Tensor]:
    """Stored parameters of one expert as views in the model's own orientation."""
    if not layout.transposed:
        return parameters
    return {
        name: tensor.t() if tensor.dim() == 2 else tensor for name, tensor in parameters.items()
    }


def activate(gate_up: Tensor, activation: str, alternating: bool) -> Tensor:
    """The gated activations the kernels know, in torch: [..., 2I] to [..., I]."""
    pair = (gate_up[..., ::2], gate_up[..., 1::2]) if alternating else gate_up.chunk(2, -1)
    gate, up = pair
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
        return gate * torch.sigmoid(gate * 1.702) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    plain: dict[str, Callable[[Tensor], Tensor]]
    plain = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    return plain[activation](gate) * up


@torch.no_grad()
def _activation(module: Any) -> tuple[str, bool] | None:
    """The known activation that the container's own gate computes, found by numbers that differ."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    gate_up = torch.linspace(-9.0, 9.0, 64)[order]
    try:
        own = module._apply_gate(gate_up[None])
    except Exception:
        return None
    for activation in ACTIVATIONS:
        for alternating in (False, True):
            known = activate(gate_up[None], activation, alternating)
            same_shape = own.shape == known.shape
            if same_shape and torch.allclose(own.float(), known, atol=1e-4, rtol=1e-4):
                return activation, alternating
    return None
