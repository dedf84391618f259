"""One arm serving a workload, and its measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.serving.arm import ServingArm

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.serving.request import Request
    from runtime.serving.sequence import ServedSequence
    from runtime.serving.settings import ServeSettings


class ServingRun:
    """One arm: an engine with a serving loop and a clock of its own.

    rate: Poisson arrivals a second of that clock, 0 for all at once. now: the time in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        arm: ServingArm,
        residency: float,
        options: ServeSettings,
        *,
        rate: float,
        seed: int,
        now: Callable[[], float],
    ) -> None:
        from runtime.serving.serving_loop import ServingLoop

        self.arm, self.residency, self.engine, self._now = arm, residency, engine, now
        self.loop = ServingLoop(engine, None, options)
        random = np.random.default_rng(seed)
        gaps = random.exponential(1 / rate, len(requests)) if rate else 0.0
        due = np.cumsum(np.broadcast_to(gaps, len(requests)))
        self._to_come = list(zip(due.tolist(), requests, strict=True))[::-1]
        self._due = {request.id: at for at, request in self._to_come}
        self.clock, self.busy, self.forecast_bytes = 0.0, 0.0, 0
        self.latency: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.tokens: dict[str, tuple[int, ...]] = {}

    @property
    def is_done(self) -> bool:
        """Whether all requests have ended."""
        return not self._to_come and self.loop.is_idle

    def step(self) -> None:
        """Submit the requests that are due and run one step."""
        if self.loop.is_idle and self._to_come:
            self.clock = max(self.clock, self._to_come[-1][0])
        while self._to_come and self._to_come[-1][0] <= self.clock:
            self.loop.submit(self._to_come.pop()[1])
        start = self._now()
        results = self.loop.step()
        seconds = self._now() - start
        self.clock += seconds
        self.busy += seconds
        sequences = *self.loop.waiting, *self.loop.active
        self.forecast_bytes = max(self.forecast_bytes, sum(map(_forecast_bytes, sequences)))
        started = (sequence.request.id for sequence in self.loop.active if sequence.num_generated)
        for id in (*started, *(result.id for result in results)):
            self.first.setdefault(id, self.clock - self._due[id])
        for result in results:
            self.latency[result.id] = self.clock - self._due[result.id]
            self.tokens[result.id] = result.token_ids

    def measure(self) -> dict[str, Any]:
        """Measurements, once all requests have ended."""
        from runtime.serving.scheduling.predicted import Predicted

        loop, stats = self.loop, self.engine.stats()
        ordering = loop.scheduler.ordering
        rested = 0
        if isinstance(ordering, Predicted):
            rested = ordering.payoff.times_rested + ordering.bursts.payoff.times_rested
        latency, first = (list(times.values()) for times in (self.latency, self.first))
        return {
            "arm": self.arm.name,
            "residency": self.residency,
            "busy_seconds": self.busy,
            "wall_seconds": loop.seconds,
            "steps": loop.num_steps,
            "generated": loop.num_generated,
            "prefilled": loop.num_prefilled,
            "loads": stats.misses,
            "bytes_per_token": stats.bytes_loaded / loop.num_generated,
            "hit_rate": stats.hit_rate,
            "recall": stats.recall,
            "tokens_per_busy_second": loop.num_generated / self.busy,
            "tokens_per_wall_second": loop.num_generated / loop.seconds,
            "p50": float(np.percentile(latency, 50)),
            "p99": float(np.percentile(latency, 99)),
            "first_token_p50": float(np.percentile(first, 50)),
            "first_token_p99": float(np.percentile(first, 99)),
            "scheduler_share": loop.scheduler.seconds / loop.seconds,
            "predictor_share": stats.seconds["predict"] / loop.seconds,
            "load_share": stats.seconds["load"] / loop.seconds,
            "key_value_bytes": loop.key_value_bytes,
            "forecast_bytes": self.forecast_bytes,
            "rested": rested,
        }


def _forecast_bytes(sequence: ServedSequence) -> int:
    """Bytes of a request's forecast and of its past keys and values in the predictor."""
    parts = () if sequence.forecast is None else sequence.forecast
    forecast = sum(part.nbytes for part in parts if isinstance(part, np.ndarray))
    return forecast + (0 if sequence.predictor_past is None else sequence.predictor_past.nbytes)
