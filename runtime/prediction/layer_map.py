"""The map between the MoE layers that a predictor covers and all of a model's.

A predictor covers one stack: all layers of a decoder-only model, or one of two stacks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from routing.layers import MoELayer
from routing.topology import NO_EXPERT, Stack
from runtime.cache.forecast import Forecast


class LayerMap:
    """Translates between the layers of `stack` and all `layers` of the model."""

    def __init__(self, layers: list[MoELayer], stack: Stack) -> None:
        self._stack = stack
        self._shape = len(layers), max(layer.num_experts for layer in layers)
        is_all = len(layers) == stack.num_layers
        own = (i for i, layer in enumerate(layers) if is_all or layer.stack == stack.name)
        self.rows = list(own)
        """Indices of the stack's layers among all layers."""

    def spread(self, forecast: Forecast) -> Forecast:
        """Extend a forecast for the stack to all layers, with zeros elsewhere."""
        if len(self.rows) == self._shape[0]:
            return forecast
        heads = self._spread(np.stack(forecast[:4]))
        remembered = forecast.remembered
        remembered = None if remembered is None else self._spread(remembered)
        return Forecast(*heads)._replace(remembered=remembered)

    def _spread(self, part: np.ndarray) -> np.ndarray:
        """Extend [..., L, E] of the stack's layers."""
        whole = np.zeros((*part.shape[:-2], *self._shape), np.float32)
        whole[..., self.rows, :] = part
        return whole

    def routes(self, experts: Mapping[int, np.ndarray], num_tokens: int) -> np.ndarray:
        """The stack's routes, int64 [T, L, K], from each layer's experts (index -> int [T, *]).

        NO_EXPERT where nothing is known.
        """
        stack = self._stack
        routes_TLK = np.full((num_tokens, stack.num_layers, stack.top_k), NO_EXPERT, np.int64)
        for row, index in enumerate(self.rows):
            experts_TK = experts.get(index)
            if experts_TK is not None and len(experts_TK) == num_tokens:
                routes_TLK[:, row, : experts_TK.shape[1]] = experts_TK
        return routes_TLK
