"""Experts that no cache holds, in captured steps: JetMoE's, of its attention.

They are called with rows that their router has sorted by expert, and with the number of rows of
each expert, which it makes on the host. No captured step may wait for that. Here each row says
which expert it is for, and gets what it is for out of the products with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing.containers import best_experts

Forwards = Sequence[tuple[nn.Module, Callable[..., Any]]]
"""Modules, each with a forward."""


def sorted_forwards(model: nn.Module) -> Forwards:
    """The routers and matrices of such experts, with forwards that do not wait for the device."""
    return [
        (module, partial(FORWARDS[type(module).__name__], module))
        for module in model.modules()
        if type(module).__name__ in FORWARDS
    ]


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """Within the block the modules run these. They are the same objects each time: code is compiled
    for them.
    """
    before = [module.__dict__.get("forward") for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        yield
    finally:
        for (module, _), own in zip(forwards, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _route(router: Any, hidden_TH: Tensor) -> tuple[Tensor, ...]:
    """The pairs (token * K + k) sorted by expert, and of each in that order its token, weight and
    expert; the logits.
    """
    logits_TE = router.layer(hidden_TH)
    routes = best_experts(logits_TE, router.top_k)
    experts_P, order_P = routes.experts_TK.flatten().sort()
    weights_P = routes.weights_TK.flatten()[order_P]
    return order_P, order_P // router.top_k, weights_P, experts_P, logits_TE.float()


def _multiply(matrices: Any, rows_PN: Tensor, experts_P: Tensor) -> Tensor:
    """Each row times the matrix of its expert."""
    products_PX = F.linear(rows_PN, matrices.weight.flatten(0, 1))
    products_PEM = products_PX.view(len(rows_PN), -1, matrices.output_size)
    return products_PEM[torch.arange(len(rows_PN), device=rows_PN.device), experts_P]


FORWARDS: dict[str, Callable[..., Any]] = {
    "JetMoeTopKGating": _route,
    "JetMoeParallelExperts": _multiply,
}
"""Classes -> their forwards."""
