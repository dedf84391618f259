"""Inputs of the experts' matrices, recorded while the original model runs over text."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing.layers import MoELayer, read_call
from runtime.cuda.memory.kernel_layout import KernelLayout, activate

MOST_BYTES = 4 << 30
"""Of all recorded inputs together."""
DOUBT = 2.0
"""Weight of the assumption that all inputs are alike, as a number of inputs for each column. With
none, moments of few inputs make weights worse on other texts than no moments at all."""


class LayerInputs(NamedTuple):
    """Inputs of one MoE layer on the CPU, and the experts that they went to."""

    hidden_TH: Tensor
    experts_TK: Tensor

    def of_expert(self, expert: int) -> Tensor:
        """The inputs of one expert."""
        return self.hidden_TH[(self.experts_TK == expert).any(-1)]


def record_inputs(
    model: Any, layers: list[MoELayer], windows: Iterable[Tensor], device: torch.device
) -> list[LayerInputs]:
    """The inputs of all layers over the windows; fewer windows where memory would not hold them."""
    recorded: list[list[LayerInputs]] = [[] for _ in layers]
    hooks = [
        layer.module.register_forward_pre_hook(partial(_record, layer, into), with_kwargs=True)
        for layer, into in zip(layers, recorded, strict=True)
    ]
    try:
        with torch.inference_mode():
            for window in windows:
                model(input_ids=window.to(device), use_cache=False)
                if sum(one.hidden_TH.nbytes for into in recorded for one in into) > MOST_BYTES:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return [LayerInputs(*map(torch.cat, zip(*into, strict=True))) for into in recorded]


def _record(layer: MoELayer, into: list[LayerInputs], _: nn.Module, args: Any, kwargs: Any) -> None:
    hidden, routes = read_call(layer, args, kwargs)
    into.append(LayerInputs(hidden.flatten(0, -2).cpu(), routes.experts_TK.cpu()))


def moments(
    inputs_TH: Tensor, parameters: dict[str, Tensor], layout: KernelLayout
) -> dict[str, Tensor]:
    """Second moments E[x x^T] of the inputs of an expert's two matrices, float32 [K, K].

    inputs_TH: of this expert, at least one.
    parameters: the expert's, float32, weights [out, in].
    """
    inputs_TH = inputs_TH.to(parameters["down_proj"])
    bias = parameters.get("gate_up_proj_bias")
    gate_up = F.linear(inputs_TH, parameters["gate_up_proj"], bias)
    middle_TI = activate(gate_up, layout)
    return {"gate_up_proj": _moments(inputs_TH), "down_proj": _moments(middle_TI)}


def _moments(inputs_TK: Tensor) -> Tensor:
    """The second moments, drawn towards equal inputs the more, the fewer inputs there are."""
    moments_KK = inputs_TK.mT @ inputs_TK / len(inputs_TK)
    doubt = DOUBT * inputs_TK.shape[1] / len(inputs_TK)
    moments_KK.diagonal().add_(doubt * moments_KK.diagonal().mean())
    return moments_KK
