"""The policy driver: the one owner of the cache's policy on a GPU.

The policy has to move on as routes become known, and its values have to reach the device:

    what runs              moves the policy on             values reach the device
    generated steps        the predictor thread            as its answers arrive, mid-step
      without a predictor  `begin_step`, `end_step`        `begin_step`: a new table
      CLOCK, COUNT, CYCLE  the device                      (they are there)
    served steps           `begin_served_step`, `revise`   the same calls
    other forward passes   the backend, and each touch     at the next captured step: `upload`

A predictor that failed counts as none.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from runtime.cache.forecast import Forecast
from runtime.cache.policy import Policy
from runtime.cache.stats import Stats
from runtime.cuda.decode.device_cache import DeviceCache
from runtime.cuda.decode.predictor_thread import PredictorRequest, PredictorThread
from runtime.prediction.forecaster import Forecaster


class PolicyDriver:
    """Moves `policy` on, and keeps its values in `device_cache` up to date.

    forecaster: predicts beside generated steps, in a thread of its own; None: nothing does.
    """

    def __init__(
        self,
        policy: Policy,
        device_cache: DeviceCache,
        stats: Stats,
        forecaster: Forecaster | None,
    ) -> None:
        self._policy, self._device_cache = policy, device_cache
        self.thread: PredictorThread | None = None
        if forecaster is not None:
            self.thread = PredictorThread(forecaster, policy, device_cache, stats)

    @property
    def likely(self) -> Tensor | None:
        """Probabilities of use in the running step and in the next, float32 [2, L * E] on the
        device.
        """
        return None if self.thread is None else self.thread.device_forecast.chances

    @property
    def runs_ahead(self) -> bool:
        """Whether a step can be scheduled before the routes of the last one are known."""
        return self.thread is not None or not self._is_from_host

    @property
    def _is_from_host(self) -> bool:
        return self._policy.rule.is_from_host

    @property
    def _predicts(self) -> bool:
        return self.thread is not None and self.thread.failure is None

    # ------------------------------------------------------------------ generated steps

    def begin_step(self) -> None:
        """Bring the device's values up to the generated step that is about to run."""
        if self.thread is not None and self._predicts:
            self.thread.device_forecast.begin_step()
        elif self._is_from_host:
            self._policy.begin_step(None)
            self._write_table()

    def predict(self, request: PredictorRequest) -> bool:
        """Tell the predictor's thread about a step or a forward pass; False without a thread."""
        if self.thread is None:
            return False
        self.thread.submit(request)
        return True

    def end_step(self, routes_LBK: np.ndarray) -> None:
        """A generated step used these experts; NO_EXPERT for none."""
        if self._is_from_host and not self._predicts:
            self._policy.touch_routes(routes_LBK)

    # ------------------------------------------------------------------ served steps

    def begin_served_step(self, forecast: Forecast | None) -> None:
        """Move on to a served step, of which `forecast` is known."""
        self._policy.begin_step(forecast)
        if forecast is not None and self.thread is not None:
            self.thread.device_forecast.write(self._policy, forecast)
        else:
            self._write_table()

    def revise(self, forecast: Forecast | None) -> None:
        """Take a better forecast of the running step; it serves the layers that are left."""
        if forecast is not None and self.thread is not None:
            self._policy.revise(forecast)
            self.thread.device_forecast.publish(self._policy, forecast)

    def end_served_step(self, routes_LBK: np.ndarray) -> None:
        """A served step used these experts; NO_EXPERT for none."""
        if self._is_from_host:
            self._policy.touch_routes(routes_LBK)

    def _write_table(self) -> None:
        table = self._policy.table()
        if table is not None:
            self._device_cache.write_table(*table)

    def close(self) -> None:
        """End the predictor's thread."""
        if self.thread is not None:
            self.thread.close()
