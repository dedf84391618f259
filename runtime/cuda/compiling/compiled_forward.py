"""A model's forward, compiled for captured steps; its experts calls are operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from routing.layers import MoELayer
from runtime.cuda.decode.fused_top_k import FusedTopKPass
from runtime.cuda.sorted_experts import Forwards, replaced
from runtime.engine.experts import call_kernels

COMPILER: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "deterministic": True,
    "post_grad_custom_pre_pass": FusedTopKPass(),
}
"""Makes the products of one token reductions of the compiler's own, at the memory's bandwidth, and
a router's choice one kernel. No reduction is tuned by the clock: else two loads of a model would
sum in different orders."""

Backend = Callable[..., Callable[..., Any]]


class CompiledForward:
    """`forward` of a model with these MoE layers, compiled anew for every kind and size of step.

    others: of further modules. num_sizes: of each kind; torch's own limit is eight, beyond which it
    would run uncompiled. fullgraph: raise where it cannot be one graph. backend: in place of
    torch's compiler.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        layers: list[MoELayer],
        others: Forwards = (),
        *,
        num_sizes: int,
        fullgraph: bool = False,
        backend: Backend | None = None,
    ) -> None:
        given: dict[str, Any] = {"options": COMPILER} if backend is None else {"backend": backend}
        self._run = torch.compile(forward, dynamic=False, fullgraph=fullgraph, **given)
        calls = [(layer.module, partial(_call, layer, n)) for n, layer in enumerate(layers)]
        self._forwards: Forwards = [*others, *calls]
        self._limit = max(torch._dynamo.config.recompile_limit, 4 * num_sizes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        limit = torch._dynamo.config.patch(recompile_limit=self._limit)
        with limit, replaced(self._forwards):
            return self._run(*args, **kwargs)


def _call(layer: MoELayer, index: int, *args: Any, **kwargs: Any) -> Tensor:
    def run(*inputs: Tensor) -> Tensor:
        sums: Tensor = torch.ops.expertflow.experts(*inputs, index)
        return sums

    return call_kernels(layer, args, kwargs, run)
