"""Mixed precision for experts: products in bfloat16, weights and gradients in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from routing.layers import find_moe_layers


class _Bfloat16(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16)


@contextmanager
def bfloat16_experts(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Let the experts of `model` compute with bfloat16 copies of their weights in this context.

    Autocast does not cover grouped matrix products, and CUDA's are fast in bfloat16 only. The
    parameters and their gradients stay float32. The optimizer may be created before or inside.
    """
    modules = [layer.module for layer in find_moe_layers(model)] if enabled else []
    for module in modules:
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            parametrize.register_parametrization(module, name, _Bfloat16(), unsafe=True)
    try:
        yield
    finally:
        for module in modules:
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
