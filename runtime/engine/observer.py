"""The observer of a model's routes: it predicts before a step and learns the truth after it.

`Observer` feeds the predictor and the route log, where there are any; without either it watches
nothing unless it is told to.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routing.layers import MoELayer, read_routes
from runtime.cache.forecast import Forecast
from runtime.cache.stats import Stats
from runtime.engine.backend import Backend, FindRoutes
from runtime.engine.step_inputs import StepInputs
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.layer_map import LayerMap
from runtime.prediction.route_log import RouteLog


class Observer:
    """Watches the experts calls of one stack, for as long as anything needs their routes."""

    def __init__(
        self,
        layers: list[MoELayer],
        map: LayerMap,
        backend: Backend,
        forecaster: Forecaster | None,
        route_log: RouteLog | None,
    ) -> None:
        self.forecaster, self.route_log = forecaster, route_log
        self._layers, self._map, self._backend = layers, map, backend
        self._stats: Stats = backend.stats
        self._routes: dict[int, Tensor] = {}
        """The experts [T, K] of each layer that has run, on its device: the host takes them all
        at once when the step has ended."""
        self._cache: weakref.ref[Any] | None = None
        """The key/value cache of the last step."""
        self.watchers: set[object] = set()
        """Whoever else looks at the routes; any thread may join or leave."""

    @property
    def _is_fed(self) -> bool:
        """Whether there is a predictor or a route log."""
        return self.forecaster is not None or self.route_log is not None

    @property
    def _is_on(self) -> bool:
        return bool(self.watchers) or self._is_fed

    def begin_step(self) -> dict[int, Tensor]:
        """A step is about to run. Returns what `resume` takes when it has ended."""
        outer, self._routes = self._routes, {}
        return outer

    def resume(self, outer: dict[int, Tensor]) -> None:
        """Go on with the step within which the last one ran, if there is one."""
        self._routes = outer

    def predict(self, inputs: StepInputs) -> Forecast | None:
        """A forecast of the step; None where nothing is predicted."""
        if self.forecaster is None or inputs.token_ids_BT is None:
            return None
        if self._backend.predict_beside(inputs):
            return None
        with self._stats.timer("predict"):
            batch = len(inputs.token_ids_BT)
            if inputs.past_length == 0 or batch != self.forecaster.batch_size:
                self.forecaster.reset(batch)
            forecast = self.forecaster.forecast(inputs.token_ids_BT, inputs.positions_BT)
        return self._map.spread(forecast)

    def spread(self, forecast: Forecast | None) -> Forecast | None:
        """A forecast for the observed layers as one for all layers."""
        return forecast and self._map.spread(forecast)

    def see(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layer `index` is called with these arguments."""
        if self._is_on:
            self._routes[index] = read_routes(self._layers[index], args, kwargs).experts_TK

    def routes(self, num_tokens: int) -> np.ndarray:
        """The step's true routes, int64 [T, L, K] of the observed layers, NO_EXPERT where a token
        uses none or a layer did not run; [T, 0, 0] where nothing needs them.
        """
        if not self._is_on:
            return _unasked(num_tokens)
        return self._map.routes(_on_host(self._routes), num_tokens)

    def of_stack(self, per_layer: np.ndarray, axis: int) -> np.ndarray:
        """The observed layers among all of the model's, along `axis`; all where none is."""
        return np.take(per_layer, self._map.rows, axis) if self._is_on else per_layer

    def observed(self, find: FindRoutes, num_tokens: int) -> np.ndarray:
        """Of the routes of all layers that `find` gives, those that `routes` would give."""
        return self.of_stack(find(), 1) if self._is_on else _unasked(num_tokens)

    def end_step(self, inputs: StepInputs, cache: Any) -> None:
        """Tell the predictor and the route log what the step used, and left in `cache` (None: not
        known).
        """
        if not self._is_fed or inputs.token_ids_BT is None:
            return
        routes_NLK = self.routes(inputs.token_ids_BT.size)
        routes_BTLK = routes_NLK.reshape(*inputs.token_ids_BT.shape, *routes_NLK.shape[1:])
        if self.forecaster is not None:
            self._learn(self.forecaster, routes_BTLK)
        if self.route_log is not None:
            if inputs.past_length and self._cache is not None and self._cache() is not inputs.cache:
                self.route_log.end()  # of other sequences, whose loop takes turns with this one
            self._cache = None if cache is None else weakref.ref(cache)
            rows = slice(self._backend.num_rows)
            tokens_BT, positions_BT = inputs.token_ids_BT[rows], inputs.positions_BT[rows]
            self.route_log.extend(tokens_BT, positions_BT, inputs.past_length, routes_BTLK[rows])

    def _learn(self, forecaster: Forecaster, routes_BTLK: np.ndarray) -> None:
        """Give the predictor the true routes of each sequence's last token, and score it."""
        routes_BLK = routes_BTLK[:, -1]
        if self._backend.learn(routes_BLK):
            return
        forecaster.observe(routes_BLK)
        if routes_BTLK.shape[1] == 1 and forecaster.this_BLE is not None:
            self._stats.count_recall(forecaster.this_BLE, routes_BLK)


def _unasked(num_tokens: int) -> np.ndarray:
    return np.zeros((num_tokens, 0, 0), np.int64)


def _on_host(routes: dict[int, Tensor]) -> dict[int, np.ndarray]:
    """Tensors of any shapes on the host, in one copy."""
    if not routes:
        return {}
    flat = torch.cat([experts.reshape(-1) for experts in routes.values()]).cpu()
    parts = flat.split([experts.numel() for experts in routes.values()])
    return {
        index: part.view(experts.shape).numpy()
        for (index, experts), part in zip(routes.items(), parts, strict=True)
    }
