"""Recorded routes in place of the router's: what a random model lacks, the reuse of a trained one.

The router itself still runs (its time counts) and still weighs the experts; only which experts is
read from a table on the device, by a counter on the device. So it works inside a captured CUDA
graph, without the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.passages import Passages
from routing.layers import find_moe_layers


class ReplayedRoutes:
    """A table of routes for up to `batch` sequences of `length` tokens, and how far they ran.

    Layer 0 looks up all layers' experts of the step at once and moves the counter; the layers after
    it take their rows. A step of T tokens a sequence moves the counter by T.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, device: torch.device) -> None:
        layers = find_moe_layers(model)
        top_k = max(layer.top_k for layer in layers)
        self._routers = [_router(model, layer.name) for layer in layers]
        self._batch, self._length = batch, length
        self._table_LPK = torch.zeros(
            len(layers), batch * length, top_k, dtype=torch.int64, device=device
        )
        self._first_B1 = torch.arange(batch, device=device)[:, None] * length
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._step_LPK: Tensor | None = None

    def start(self, passages: Passages) -> None:
        """The next token to run is the first of `passages` (in place: captured graphs see it)."""
        assert passages.experts_BTLK is not None
        experts_LBTK = torch.from_numpy(passages.experts_BTLK).permute(2, 0, 1, 3)
        table_LBTK = self._table_LPK.view(-1, self._batch, self._length, experts_LBTK.shape[-1])
        table_LBTK[:, :, : experts_LBTK.shape[2]].copy_(experts_LBTK)
        self._position.zero_()

    @property
    def position(self) -> int:
        """Tokens that ran in each sequence since `start`. Synchronises."""
        return int(self._position)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Meanwhile the model's routers answer from the table."""
        for layer, router in enumerate(self._routers):
            router.forward = partial(self._route, layer, router.forward)
        try:
            yield
        finally:
            for router in self._routers:
                router.__dict__.pop("forward", None)

    def _route(self, layer: int, own: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights_PK, experts_PK = own(hidden)
        if layer == 0:
            self._step_LPK = self._look_up(len(experts_PK) // self._batch)
        assert self._step_LPK is not None
        return logits, weights_PK, self._step_LPK[layer]

    def _look_up(self, num_tokens: int) -> Tensor:
        """Experts of the next `num_tokens` of every sequence, [L, B * T, K]; moves the counter."""
        ahead_T = torch.arange(num_tokens, device=self._position.device)
        rows_BT = self._first_B1 + (self._position + ahead_T) % self._length
        self._position.add_(num_tokens)
        return self._table_LPK.index_select(1, rows_BT.view(-1))


def _router(model: nn.Module, experts_name: str) -> nn.Module:
    """The router beside an experts container: it returns (logits, weights [P, K], experts)."""
    return model.get_submodule(f"{experts_name.rpartition('.')[0]}.gate")
