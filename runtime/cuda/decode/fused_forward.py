"""A model's forward with its RMS norms and small top-k in one kernel each.

A norm is recognised by what it computes on random numbers, not by its class. Captured steps have
both fused, other forward passes their norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from runtime.cuda.decode.fused_top_k import FusedTopK
from runtime.cuda.host_constants import HostConstants
from runtime.cuda.kernels.dense.norm import rms_norm
from runtime.cuda.sorted_experts import replaced, sorted_forwards

EPSILONS = "variance_epsilon", "eps"
"""Names under which modules keep what they add to the mean square."""
SCALES = 1.0, 30.0, 1e-3
"""Sizes of the numbers of a trial: with the smallest, epsilon counts."""


class FusedForward:
    """`model.forward` with fused operations. The first call, not captured, tries the norms."""

    def __init__(self, model: nn.Module) -> None:
        self._forward, self._norms = model.forward, FusedNorms(model)
        self._constants = HostConstants()
        self._sorted = sorted_forwards(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; its modules are their own again afterwards."""
        own = replaced(self._sorted)
        with self._norms.in_use(), own, FusedTopK(), self._constants:
            return self._forward(*args, **kwargs)


class FusedNorms:
    """The RMS norms of `model` in one kernel each, which are found at first use."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._norms: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block the modules run fused."""
        if self._norms is None:
            found = ((module, fused_norm(module)) for module in self._model.modules())
            self._norms = [(module, fused) for module, fused in found if fused is not None]
        with replaced([norm for norm in self._norms if "forward" not in norm[0].__dict__]):
            yield


def fused_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward in one kernel that equals the module's own to rounding; None: it has none."""
    names = [name for name, _ in module.named_parameters()]
    name = next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if names != ["weight"] or name is None or len([*module.buffers()]) or len([*module.children()]):
        return None
    weight: Any = module.weight
    if weight.dim() != 1 or weight.is_meta or "forward" in module.__dict__:
        return None
    if len(signature(module.forward).parameters) != 1:  # a gate, say
        return None
    late = _order(module, weight, getattr(module, name))
    if late is None:
        return None
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        held: Any = module.weight
        if x.dtype != held.dtype or x.device != held.device or not x.is_contiguous():
            return own(x)
        if torch.is_grad_enabled() and (x.requires_grad or held.requires_grad):
            return own(x)
        return rms_norm(x, held, getattr(module, name), late=late)

    return forward


@torch.no_grad()
def _order(module: nn.Module, weight: Tensor, eps: float) -> bool | None:
    """Whether the module rounds after its weight (True) or before (False); None: neither."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(len(SCALES), 1, len(weight), generator=random)
    x = (x * torch.tensor(SCALES)[:, None, None]).to(weight.device, weight.dtype)
    own = module.forward(x)
    if not isinstance(own, Tensor) or own.shape != x.shape or own.dtype != x.dtype:
        return None
    differing = {}
    for late in (False, True):
        error = (rms_norm(x, weight, eps, late=late).float() - own.float()).abs()
        least = 2 * torch.finfo(x.dtype).eps
        if bool((error <= least * own.float().abs()).all()):
            differing[late] = int((error > 0).sum())
    return min(differing, key=lambda late: differing[late]) if differing else None
