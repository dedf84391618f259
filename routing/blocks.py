"""MoE blocks: the modules around experts, whose routers can be run early.

Routers differ in name, arguments and results, but not in their place. The block that holds the
experts passes its input to the router, and the router's decision arrives at the experts call. So a
router is run by running its block up to that call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from routing.layers import TOP_K_NAMES, MoELayer, Routes, find_moe_layers, read_routes

MIN_WEIGHT = 1e-7
"""Smallest weight of an expert that a router names."""
CHOSEN_BONUS = 100.0
"""More than any difference between the logarithms of two weights."""


class Ranking(NamedTuple):
    """M experts for each of N rows, the most likely first."""

    experts_NM: Tensor
    """int64"""
    scores_NM: Tensor
    """float32: logarithms of the router's weights; -inf where it names no further expert."""


class _ExpertsCall(Exception):
    """Ends a block's forward at its experts call; it is not an error."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes


class Block(NamedTuple):
    """An MoE layer and the module whose input its router reads."""

    layer: MoELayer
    module: nn.Module

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The router input [..., H] among the arguments of the block's call.

        Raises ValueError where the block reads another floating-point tensor as well, whose value a
        few layers earlier is unknown.
        """
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        floating = [value for value in values if value.is_floating_point()]
        if len(floating) != 1:
            raise ValueError(
                f"{type(self.module).__name__} ({self.layer.name}) routes by {len(floating)} "
                "tensors instead of its hidden states alone: it has no look-ahead, and no router "
                "values to record"
            )
        return floating[0]

    def rank(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, count: int
    ) -> Ranking:
        """The `count` experts that the router ranks highest, given `hidden` as its input.

        `args` and `kwargs` are the block's own call. The first top-k are exactly the experts that
        it would run, with its bias and groups; the others are those that it chooses when its top-k
        is raised.
        """
        own = self.hidden(args, kwargs)
        args = tuple(hidden if value is own else value for value in args)
        kwargs = {key: hidden if value is own else value for key, value in kwargs.items()}
        chosen = self._route(self.layer, args, kwargs)
        with self._choosing(count):
            wide = self._route(self.layer._replace(top_k=count), args, kwargs)
        return _ranked(chosen, wide, count)

    def _route(self, layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routes:
        if self.module is layer.module:
            return read_routes(layer, args, kwargs)

        def divert(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
            raise _ExpertsCall(read_routes(layer, args, kwargs))

        hook = layer.module.register_forward_pre_hook(divert, prepend=True, with_kwargs=True)
        try:
            self.module.forward(*args, **kwargs)
        except _ExpertsCall as call:
            return call.routes
        finally:
            hook.remove()
        raise AssertionError(f"{type(self.module).__name__} never called its experts")

    @contextmanager
    def _choosing(self, count: int) -> Iterator[None]:
        """A context in which the router chooses `count` experts, if an attribute sets its top-k."""
        owners = [
            (module, name)
            for module in self.module.modules()
            for name in TOP_K_NAMES
            if type(getattr(module, name, None)) is int
        ]
        before = [getattr(module, name) for module, name in owners]
        try:
            for module, name in owners:
                setattr(module, name, count)
            yield
        finally:
            for (module, name), value in zip(owners, before, strict=True):
                setattr(module, name, value)


def _ranked(chosen: Routes, wide: Routes, count: int) -> Ranking:
    """The chosen experts, then those that a wider choice adds, each by weight."""
    same_NKW = chosen.experts_TK[:, :, None] == wide.experts_TK[:, None]
    of_wide_NK = (same_NKW * wide.weights_TK[:, None]).sum(-1)
    of_chosen_NK = torch.where(same_NKW.any(-1), of_wide_NK, chosen.weights_TK)
    experts_NC = torch.cat([chosen.experts_TK, wide.experts_TK], 1)
    scores_NC = torch.cat([of_chosen_NK, wide.weights_TK], 1).float().clamp(min=MIN_WEIGHT).log()
    named_NC = torch.cat([chosen.experts_TK >= 0, (wide.experts_TK >= 0) & ~same_NKW.any(1)], 1)
    scores_NC = scores_NC.masked_fill(~named_NC, -torch.inf)
    first_NC = scores_NC.clone()
    first_NC[:, : chosen.experts_TK.shape[1]] += CHOSEN_BONUS
    order_NM = first_NC.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return Ranking(experts_NC.gather(1, order_NM).clamp(min=0), scores_NC.gather(1, order_NM))


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of the model's MoE layers, in execution order.

    Raises ValueError, naming the architecture, where the experts lie in a decoder layer itself: the
    router's input is then unknown.
    """
    return [Block(layer, _block(model, layer)) for layer in find_moe_layers(model)]


def _block(model: nn.Module, layer: MoELayer) -> nn.Module:
    from transformers.modeling_layers import GradientCheckpointingLayer

    if layer.kind == "jetmoe":  # its block routes by itself
        return layer.module
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    if isinstance(parent, GradientCheckpointingLayer):
        raise ValueError(
            f"{type(model).__name__} has no MoE block: its experts lie in "
            f"{type(parent).__name__} itself, where a router's input is unknown, so there is no "
            "look-ahead, and there are no router values to record"
        )
    return parent
