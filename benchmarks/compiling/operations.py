"""One layer's operations for one token, compiled and not: where the numbers part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.cuda.compiling.compiled_forward import COMPILER

TRIALS = 20
Operation = Callable[..., Tensor]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


def _residual_norm(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return _norm(x + y, weight)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def _router(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).float().softmax(-1)


def operations(hidden: int, device: torch.device) -> Iterator[tuple[str, Operation, list[Tensor]]]:
    """Names, functions and inputs, in bfloat16."""
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=random, device=device) * scale
        return drawn.to(torch.bfloat16)

    x, y, weight = draw(1, hidden), draw(1, hidden), draw(hidden)
    heads, angles = draw(1, 16, 1, 128), draw(1, 1, 1, 128).float()
    yield "norm", _norm, [x, weight]
    yield "residual and norm", _residual_norm, [x, y, weight]
    yield "rotary", _rotary, [heads, angles.cos().bfloat16(), angles.sin().bfloat16()]
    yield "linear", F.linear, [x, draw(hidden, hidden, scale=0.02)]
    yield "router's softmax", _router, [x, draw(64, hidden, scale=0.02)]


@torch.no_grad()
def compare(hidden: int, device: torch.device, options: dict[str, Any]) -> list[dict[str, Any]]:
    """For each operation the share of numbers that are equal, and the largest difference over the
    largest number, eager and compiled with `options` beside `COMPILER`.
    """
    found = []
    for name, function, inputs in operations(hidden, device):
        torch._dynamo.reset()
        compiled = torch.compile(function, dynamic=False, options=COMPILER | options)
        equal, error = 0.0, 0.0
        for trial in range(TRIALS):
            given = [inputs[0] * (1 + trial / 7), *inputs[1:]]
            want, got = function(*given).float(), compiled(*given).float()
            equal += float((want == got).float().mean())
            error = max(error, float((want - got).abs().max() / want.abs().max()))
        found.append({"operation": name, "equal": equal / TRIALS, "error": error})
    return found
