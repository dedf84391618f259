"""One arm of `benchmarks.serving`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from runtime.engine.engine import Engine
    from runtime.serving.request import Request
    from runtime.serving.sequence import ServedSequence
    from runtime.serving.settings import ServeSettings


class Arm(NamedTuple):
    """What one lane does differently."""

    name: str
    scheduler: str
    policy: str
    extra: float
    """Share of the experts that is resident beyond what the table's residency says."""
    options: dict[str, int]
    """Fields of `ServeSettings`."""

    @classmethod
    def parse(cls, name: str) -> Arm:
        """Read SCHEDULER,KEY=VALUE,... Raises ValueError."""
        scheduler, *words = name.split(",")
        given = dict(word.split("=") for word in words)
        policy, extra = given.pop("policy", "predicted"), float(given.pop("extra", 0.0))
        return cls(name, scheduler, policy, extra, {key: int(given[key]) for key in given})


class Lane:
    """One arm: an engine, its own loop and its own clock. Arrivals are in this clock too.

    rate: Poisson arrivals a second, 0 for all at once. now: what the clock goes by.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        arm: Arm,
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
        self._coming = list(zip(due.tolist(), requests, strict=True))[::-1]
        self._due = {request.id: at for at, request in self._coming}
        self.clock, self.busy, self.outlook_bytes = 0.0, 0.0, 0
        self.latency: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.tokens: dict[str, tuple[int, ...]] = {}

    @property
    def is_done(self) -> bool:
        return not self._coming and self.loop.is_idle

    def turn(self) -> None:
        """Submit what is due and run one step."""
        if self.loop.is_idle and self._coming:
            self.clock = max(self.clock, self._coming[-1][0])
        while self._coming and self._coming[-1][0] <= self.clock:
            self.loop.submit(self._coming.pop()[1])
        start = self._now()
        results = self.loop.step()
        seconds = self._now() - start
        self.clock += seconds
        self.busy += seconds
        sequences = *self.loop.waiting, *self.loop.active
        self.outlook_bytes = max(self.outlook_bytes, sum(map(_outlook_bytes, sequences)))
        started = (sequence.request.id for sequence in self.loop.active if sequence.num_generated)
        for id in (*started, *(result.id for result in results)):
            self.first.setdefault(id, self.clock - self._due[id])
        for result in results:
            self.latency[result.id] = self.clock - self._due[result.id]
            self.tokens[result.id] = result.token_ids

    def measure(self) -> dict[str, Any]:
        """What there is to say once all requests ended."""
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
            "outlook_bytes": self.outlook_bytes,
            "rested": rested,
        }


def _outlook_bytes(sequence: ServedSequence) -> int:
    """Of the predictor's memory of a request, and of what it said."""
    forecast = sum(array.nbytes for array in sequence.forecast or ())
    return forecast + (0 if sequence.predictor_past is None else sequence.predictor_past.nbytes)
