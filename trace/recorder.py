"""Recorder of the experts that every token uses, hooked on the experts calls.

B sequences, T tokens, L MoE layers, K experts a token, N = B x T rows of one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from routing.layers import MoELayer, Routes, by_stack, find_moe_layers, read_routes
from routing.lookahead import LookAhead
from routing.shards import stored_experts
from routing.topology import NO_EXPERT
from routing.trace_format.extras import Extras, RouterLogits
from trace.early_gates import EarlyGates
from trace.router_values import RouterValues


class Recording(NamedTuple):
    """The routes of one batch through one stack of layers, padding tokens included."""

    experts_BTLK: np.ndarray
    """As stored in traces, see `routing.shards.stored_experts`."""
    weights_BTLK: np.ndarray
    """float16"""
    layers: tuple[str, ...]
    """Names of the L layers."""
    ahead: LookAhead | None = None
    """[B, T, L, D, M]: rankings of later gates on earlier router inputs, where asked for."""
    router: RouterLogits | None = None
    """[B, T, L, M]: the highest router logits, where asked for."""
    hidden: Mapping[int, np.ndarray] = {}
    """MoE layer -> router inputs [B, T, H], where asked for."""

    def nan_layer(self, row: int, span: slice) -> str | None:
        """The first layer whose router weights are NaN in `span` of sequence `row`, if any."""
        broken_L = np.isnan(self.weights_BTLK[row, span]).any((0, 2))
        return self.layers[int(broken_L.argmax())] if broken_L.any() else None


class Recorder:
    """Hooks on every experts call of a model; `take` returns the routes recorded since the last.

    Routes are read at the experts call and never from router logits: with a selection bias or
    group limits, the top-k of the logits are not the experts that run.
    """

    def __init__(
        self, model: nn.Module, *, lookahead: int = 0, extras: Extras | None = None
    ) -> None:
        self._stacks = dict(by_stack(find_moe_layers(model)))
        self._gates = EarlyGates(model, lookahead) if lookahead else None
        asked = extras is not None and (extras.router_logits or extras.hidden)
        self._values = RouterValues(model, extras) if extras is not None and asked else None
        self._calls: dict[str, list[Routes]] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer in (layer for layers in self._stacks.values() for layer in layers):
            self._calls[layer.name] = []
            hook = self._hook(layer, self._calls[layer.name])
            self._hooks.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        if self._gates is not None:
            self._hooks += self._gates.hooks()
        if self._values is not None:
            self._hooks += self._values.hooks()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @staticmethod
    def _hook(layer: MoELayer, calls: list[Routes]) -> Any:
        dtype = torch.int16 if layer.num_experts <= 256 else torch.int32

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routes = read_routes(layer, args, kwargs)
            calls.append(Routes(routes.experts_TK.to(dtype), routes.weights_TK.half()))

        return record

    def take(self, batch_size: int) -> dict[str, Recording]:
        """The routes since the last `take`, by stack; consecutive calls are joined along T.

        Raises ValueError if the model does not send every token of the batch through each layer.
        """
        return {name: self._recording(layers, batch_size) for name, layers in self._stacks.items()}

    def _recording(self, layers: list[MoELayer], batch_size: int) -> Recording:
        top_k = max(layer.top_k for layer in layers)
        for layer in layers:
            if not self._calls[layer.name]:
                raise ValueError(f"{layer.name} saw no tokens: it serves another kind of input")
        joined = [_join(self._calls[layer.name], batch_size, top_k) for layer in layers]
        for layer, routes in zip(layers, joined, strict=True):
            self._calls[layer.name].clear()
            if routes.experts_TK.shape != joined[0].experts_TK.shape:
                raise ValueError(f"{layer.name} and {layers[0].name} did not see the same tokens")
        experts_BTLK = torch.stack([routes.experts_TK for routes in joined], dim=2)
        weights_BTLK = torch.stack([routes.weights_TK for routes in joined], dim=2)
        num_experts = max(layer.num_experts for layer in layers)
        return Recording(
            stored_experts(experts_BTLK.cpu().numpy(), num_experts),
            weights_BTLK.cpu().numpy(),
            tuple(layer.name for layer in layers),
            None if self._gates is None else self._gates.take(layers, batch_size),
            *((None, {}) if self._values is None else self._values.take(layers, batch_size)),
        )


def _join(calls: list[Routes], batch_size: int, top_k: int) -> Routes:
    """One layer's consecutive calls, [B x T', K'] each, as [B, T, K]."""
    return Routes(
        _fill([call.experts_TK for call in calls], batch_size, top_k, NO_EXPERT),
        _fill([call.weights_TK for call in calls], batch_size, top_k, 0),
    )


def _fill(rows_NK: list[Tensor], batch_size: int, top_k: int, filler: int) -> Tensor:
    joined_BTK = torch.cat([rows.view(batch_size, -1, rows.shape[-1]) for rows in rows_NK], dim=1)
    return pad(joined_BTK, (0, top_k - joined_BTK.shape[-1]), value=filler)
