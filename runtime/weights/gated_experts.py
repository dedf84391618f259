"""The layouts of gated experts that kernels can run, recognised by trying them out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing.layers import MoELayer
from runtime.weights.arena import Specs

ACTIVATIONS = (
    "silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu", "relu2", "bounded_silu",
    "softcapped_silu",
)  # fmt: skip
"""In the order of the kernels' constants."""
BOUNDED = "bounded_silu", "softcapped_silu"
"""Those with bounds of the gate and of the up projection, which a model chooses."""
UNGATED = "relu2"
"""The one that has no gate: its experts have an up projection alone."""


class Gating(NamedTuple):
    """How an expert's first product becomes the input of its second."""

    activation: str
    alternating: bool = False
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class KernelLayout:
    """The way kernels read a gated expert's parameters."""

    hidden: int
    """H"""
    width: int
    """I, rows of the up (and of the gate) projection."""
    activation: str
    bounds: tuple[float, float] | None = None
    """Of gate and up, where the activation has any."""
    alternating: bool
    """Gate and up rows alternate, instead of gate first, then up."""
    transposed: bool
    """The model keeps its weights [in, out]; slots and host tier keep [out, in]."""
    has_bias: bool
    dtype: torch.dtype

    @property
    def matrices(self) -> tuple[str, str]:
        """The names of both products' weights."""
        return matrices_of(is_gated=self.activation != UNGATED)


def matrices_of(*, is_gated: bool) -> tuple[str, str]:
    """The names of an expert's weights: of the first product, and of the second."""
    return ("gate_up_proj" if is_gated else "up_proj"), "down_proj"


def gated_layout(
    layer: MoELayer, specs: Specs, kinds: Collection[str] = ("fused",)
) -> KernelLayout | str:
    """The layout of `layer`'s experts, or why the kernels cannot run them.

    kinds: of containers whose calls the caller can answer.
    """
    module: Any = layer.module
    says_gate = layer.kind != "fused" or hasattr(module, "_apply_gate")
    is_gated = getattr(module, "has_gate", says_gate)
    names = set(matrices_of(is_gated=is_gated))
    biased = names | {f"{name}_bias" for name in names}
    if layer.kind not in kinds or set(specs) not in (names, biased):
        return f"experts with parameters {', '.join(sorted(specs))} have no kernel"
    if getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__name__} has a norm behind each expert"
    dtypes = {spec.dtype for spec in specs.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"no kernel for experts in {', '.join(map(str, dtypes))}"
    found = _activation(layer) if is_gated else _ungated_activation(module)
    if found is None:
        return f"the activation of {type(module).__name__} has no kernel"
    shape = specs["down_proj"].shape
    transposed = bool(getattr(module, "is_transposed", layer.kind == "llama4"))
    width, hidden = shape if transposed else shape[::-1]
    return KernelLayout(
        hidden=hidden,
        width=width,
        activation=found.activation,
        bounds=found.bounds,
        alternating=found.alternating,
        transposed=transposed,
        has_bias=set(specs) == biased,
        dtype=dtypes.pop(),
    )


def activate(gate_up: Tensor, gating: Gating | KernelLayout) -> Tensor:
    """The activations that kernels know, in torch: [..., 2I] to [..., I]; without a gate [..., I]
    to [..., I].
    """
    if gating.activation == UNGATED:
        return F.relu(gate_up).square()
    halves = (gate_up[..., ::2], gate_up[..., 1::2]) if gating.alternating else None
    gate, up = halves or gate_up.chunk(2, -1)
    if gating.activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
        return gate * torch.sigmoid(gate * 1.702) * up
    if gating.activation in BOUNDED:
        assert gating.bounds is not None
        return _bounded(gate, up, gating.activation, gating.bounds)
    if gating.activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    plain: dict[str, Callable[[Tensor], Tensor]]
    plain = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    return plain[gating.activation](gate) * up


def _bounded(gate: Tensor, up: Tensor, activation: str, bounds: tuple[float, float]) -> Tensor:
    of_gate, of_up = bounds
    if activation == "bounded_silu":
        return F.silu(gate.clamp(max=of_gate)) * up.clamp(-of_up, of_up)
    capped_gate, capped_up = (
        torch.tanh(x / cap) * cap for x, cap in ((gate, of_gate), (up, of_up))
    )
    return capped_gate * torch.sigmoid(gate) * capped_up


def _gated(layer: MoELayer, gate_up: Tensor) -> Tensor:
    """As containers have it that say only their activation."""
    gate, up = gate_up.chunk(2, -1)
    activated: Tensor = layer.container.activation(layer.module)(gate) * up
    return activated


@torch.no_grad()
def _activation(layer: MoELayer) -> Gating | None:
    """The known activation that the container's own gate computes, found by numbers that differ."""
    gate_up = _numbers()
    try:
        own = getattr(layer.module, "_apply_gate", partial(_gated, layer))(gate_up[None])
    except Exception:
        return None
    plain = [one for one in ACTIVATIONS if one not in (UNGATED, *BOUNDED)]
    candidates = [Gating(*pair) for pair in product(plain, (False, True))]
    candidates += [Gating(*way) for way in product(BOUNDED, (False,), _bounds(layer.module))]
    for found in candidates:
        known = activate(gate_up[None], found)
        same_shape = own.shape == known.shape
        if same_shape and torch.allclose(own.float(), known, atol=1e-4, rtol=1e-4):
            return found
    return None


def _bounds(module: nn.Module) -> list[tuple[float, float]]:
    """Pairs of the numbers that a container and its activation call a limit or a cap."""
    named = chain.from_iterable(vars(one).items() for one in module.modules())
    limits = [
        float(value)
        for name, value in named
        if isinstance(value, int | float) and value > 0 and ("limit" in name or "cap" in name)
    ]
    return list(dict.fromkeys(product(limits, limits)))


@torch.no_grad()
def _ungated_activation(module: Any) -> Gating | None:
    """As `_activation`, of a container whose experts have no gate."""
    numbers = _numbers()
    try:
        own: Tensor = module.act_fn(numbers)
    except Exception:
        return None
    same = torch.allclose(own.float(), activate(numbers, Gating(UNGATED)), atol=1e-4, rtol=1e-4)
    return Gating(UNGATED) if same else None


def _numbers() -> Tensor:
    """What activations are told apart by; far ones, for bounds that a model may have."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    far = torch.logspace(1, 4, 16)
    return torch.cat([torch.linspace(-9.0, 9.0, 64), far, -far])[order]
