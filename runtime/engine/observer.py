"""What is learnt from each step: its true routes, for the predictor and for the recorder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from routing.layers import MoELayer, read_routes
from routing.topology import Stack
from runtime.cache.policies import Forecast
from runtime.cache.stats import Stats
from runtime.engine.step_inputs import StepInputs
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.layer_map import LayerMap
from runtime.prediction.route_log import RouteLog

if TYPE_CHECKING:
    from runtime.cuda.backend import CudaBackend


class Observer:
    """Watches the experts calls of `stack`. At least one of forecaster and recorder is given."""

    def __init__(
        self,
        layers: list[MoELayer],
        stack: Stack,
        stats: Stats,
        forecaster: Forecaster | None,
        route_log: RouteLog | None,
        gpu: CudaBackend | None,
    ) -> None:
        self.stack = LayerMap(layers, stack)
        self.forecaster, self.route_log = forecaster, route_log
        self._layers, self._stats, self._gpu = layers, stats, gpu
        self._routes: dict[int, np.ndarray] = {}

    def begin_step(self) -> None:
        """Forget the routes of the last step."""
        self._routes.clear()

    def see(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layer `index` runs with these arguments."""
        self._routes[index] = (
            read_routes(self._layers[index], args, kwargs).experts_TK.cpu().numpy()
        )

    def routes(self, num_tokens: int) -> np.ndarray:
        """The step's routes, int64 [T, L, K] of the stack, NO_EXPERT for none."""
        return self.stack.routes(self._routes, num_tokens)

    def predict(self, inputs: StepInputs) -> Forecast | None:
        """For the step about to run; None where nothing is predicted, or beside the step."""
        if self.forecaster is None or inputs.token_ids_BT is None:
            return None
        if self._gpu is not None and self._gpu.announce(inputs):
            return None
        with self._stats.timer("predict"):
            batch = len(inputs.token_ids_BT)
            if inputs.past_length == 0 or batch != self.forecaster.batch_size:
                self.forecaster.reset(batch)
            forecast = self.forecaster.forecast(inputs.token_ids_BT, inputs.positions_BT)
        return self.stack.spread(forecast)

    def end_step(self, inputs: StepInputs) -> None:
        """Tell predictor and recorder what the step used."""
        if inputs.token_ids_BT is None:
            return
        routes_NLK = self.routes(inputs.token_ids_BT.size)
        routes_BTLK = routes_NLK.reshape(*inputs.token_ids_BT.shape, *routes_NLK.shape[1:])
        if self.forecaster is not None:
            self._learn(self.forecaster, routes_BTLK)
        if self.route_log is not None:
            rows = slice(self._gpu and self._gpu.num_rows)
            tokens_BT, positions_BT = inputs.token_ids_BT[rows], inputs.positions_BT[rows]
            self.route_log.extend(tokens_BT, positions_BT, inputs.past_length, routes_BTLK[rows])

    def _learn(self, forecaster: Forecaster, routes_BTLK: np.ndarray) -> None:
        """Give the predictor the true routes of each sequence's last token, and score it."""
        routes_BLK = routes_BTLK[:, -1]
        if self._gpu is not None and self._gpu.remember(routes_BLK):
            return
        forecaster.observe(routes_BLK)
        if routes_BTLK.shape[1] == 1 and forecaster.this_BLE is not None:
            self._stats.count_recall(forecaster.this_BLE, routes_BLK)
