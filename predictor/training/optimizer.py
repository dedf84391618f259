"""The optimizer of training: AdamW, and Muon for the matrices between hidden states.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) steps along the momentum with all its
singular values set to about one. The step is scaled to AdamW's usual step (Liu et al. 2025,
arXiv 2502.16982, section 2.2), so that both share a learning rate.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration."""
ITERATIONS = 5
ADAM_STEP = 0.2
"""Typical root mean square of an AdamW update, over its learning rate."""


class Muon(torch.optim.Optimizer):
    """Muon on `matrices`, AdamW on `others`; one-dimensional parameters have no weight decay.

    A tensor [..., R, C] among the matrices, such as all experts of a layer, is a stack of matrices.
    """

    MOMENTUM = 0.95
    BETAS = (0.9, 0.98)
    EPSILON = 1e-8

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"kind": "muon", "params": list(matrices)},
            {"kind": "adamw", "params": [p for p in others if p.dim() > 1]},
            {"kind": "adamw", "params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "weight_decay": weight_decay, "steps": 0}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step. Parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                (self._muon if group["kind"] == "muon" else self._adamw)(group, params)
        return loss

    def _moments(self, params: list[Tensor], name: str) -> list[Tensor]:
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        momenta = self._moments(params, "momentum")
        torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
        updates = torch._foreach_lerp(grads, momenta, self.MOMENTUM)  # Nesterov's look ahead
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, p in enumerate(params):
            by_shape[p.shape].append(index)
        for shape, chosen in by_shape.items():
            steps = orthogonal(torch.stack([updates[i] for i in chosen]))
            scale = -group["lr"] * ADAM_STEP * max(shape[-2:]) ** 0.5
            torch._foreach_add_([params[i] for i in chosen], list(steps.unbind(0)), alpha=scale)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (first, second), count = self.BETAS, group["steps"]
        grads = [p.grad for p in params if p.grad is not None]
        means, squares = self._moments(params, "mean"), self._moments(params, "square")
        torch._foreach_lerp_(means, grads, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, grads, grads, 1 - second)
        spread = torch._foreach_sqrt(squares)
        torch._foreach_div_(spread, (1 - second**count) ** 0.5)
        torch._foreach_add_(spread, self.EPSILON)
        torch._foreach_addcdiv_(params, means, spread, value=-group["lr"] / (1 - first**count))


def warmup_cosine(progress: float, warmup: float) -> float:
    """The learning rate over its peak, after a share `progress` of the steps."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1)))


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """Move the singular values of each matrix to about one, by a Newton-Schulz iteration.

    N stands for any number of dimensions.
    """
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices_NRC.dtype)
