"""The look-ahead of prompts: which experts the next layer will want, by its router asked early."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from routing.layers import MoELayer
from runtime.cuda.prefetching import Prefetching
from runtime.cuda.prefill.streaming_pool import Ahead, StreamingPool
from runtime.cuda.prefill.telling import told

LEAST_TOKENS = 16
"""Tokens of a forward pass from which its router input foretells a layer's union of experts."""


class LookAhead:
    """Asks the routers of `layers` one layer early, where prompts are to prefetch.

    pools: of each layer. routers: of each layer; None where there is none to be found.
    """

    def __init__(
        self,
        layers: list[MoELayer],
        pools: list[StreamingPool],
        routers: list[nn.Module | None],
        prefetching: Prefetching,
    ) -> None:
        self._layers, self._pools, self._routers = layers, pools, routers
        self._prefetching = prefetching

    def after(self, index: int, hidden_TH: Tensor) -> Ahead | None:
        """The experts that the layer after `index` will want, where some of them are missing.

        None where that is not known, or not asked for.
        """
        following = index + 1
        if not self._prefetching.in_prompts or len(hidden_TH) < LEAST_TOKENS:
            return None
        if following == len(self._layers):
            return None
        pool, router = self._pools[following], self._routers[following]
        if router is None or self._pools[index] is not pool or not pool.lacks(following):
            return None
        wanted_E = _wanted(hidden_TH, router, self._layers[following].top_k)
        return Ahead(following, told(wanted_E))


def _wanted(hidden_TH: Tensor, router: Any, top_k: int) -> Tensor:
    """How many tokens each expert of a router would get, int64 [E]. No host sync."""
    logits_TE = F.linear(hidden_TH, router.weight, getattr(router, "bias", None))
    chosen_P = logits_TE.topk(min(top_k, logits_TE.shape[-1]), -1).indices.reshape(-1)
    counts_E = chosen_P.new_zeros(logits_TE.shape[-1])
    return counts_E.scatter_add_(0, chosen_P, chosen_P.new_ones(len(chosen_P)))


def router_of(model: nn.Module, layer: MoELayer) -> nn.Module | None:
    """The router beside a layer's experts: the child whose weight is [E, *]; None without one."""
    block = model.get_submodule(layer.name.rpartition(".")[0])
    for child in block.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == layer.num_experts:
            return child
    return None
