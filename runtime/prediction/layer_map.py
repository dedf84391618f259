"""The MoE layers that a predictor speaks of, among all of a model's: one stack of two, or all."""

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
        """Indices of the stack's layers among all."""

    def spread(self, forecast: Forecast) -> Forecast:
        """A forecast for the stack as one for all layers: zero elsewhere."""
        if len(self.rows) == self._shape[0]:
            return forecast
        spread = [np.zeros(self._shape, np.float32) for _ in forecast]
        for whole, part in zip(spread, forecast, strict=True):
            whole[self.rows] = part
        return Forecast(*spread)

    def routes(self, experts: Mapping[int, np.ndarray], num_tokens: int) -> np.ndarray:
        """int64 [T, L, K] of the stack, from what each layer routed (int [T, *], by its index).

        NO_EXPERT where nothing is known.
        """
        stack = self._stack
        routes_TLK = np.full((num_tokens, stack.num_layers, stack.top_k), NO_EXPERT, np.int64)
        for row, index in enumerate(self.rows):
            experts_TK = experts.get(index)
            if experts_TK is not None and len(experts_TK) == num_tokens:
                routes_TLK[:, row, : experts_TK.shape[1]] = experts_TK
        return routes_TLK
