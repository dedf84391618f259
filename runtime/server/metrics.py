"""Metrics for Prometheus, at /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.serving.async_server import AsyncServer
from runtime.serving.request import Result

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Reads the engine's and the loop's own counts when asked; only latencies are kept here."""

    def __init__(self, server: AsyncServer) -> None:
        self._server = server
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._latency = Histogram(
            "expertflow_request_seconds",
            "From a request's arrival to its end.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "expertflow_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )

    def observe(self, result: Result) -> None:
        """Count the latencies of a request that ended."""
        self._latency.observe(result.finished - result.arrived)
        if result.token_ids:
            self._first_token.observe(result.first_token - result.arrived)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The counts of this moment, for the registry."""
        loop, stats = self._server.loop, self._server.engine.stats()
        counts = {
            "expert_hits": ("Expert requests that found their expert resident.", stats.hits),
            "expert_loads": ("Experts copied into slots.", stats.misses),
            "expert_bytes": ("Bytes of experts copied into slots.", stats.bytes_loaded),
            "steps": ("Forward passes.", loop.num_steps),
            "generated_tokens": ("Tokens chosen.", loop.num_generated),
            "prompt_tokens": ("Prompt tokens run.", loop.num_prefilled),
            "step_seconds": ("Time in steps, everything included.", loop.seconds),
            "schedule_seconds": ("Time of the scheduler.", loop.scheduler.seconds),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(f"expertflow_{name}", text, value=value)
        ended = CounterMetricFamily("expertflow_requests", "Requests ended.", labels=["finish"])
        for finish in ("stop", "length", "cancelled", "error"):
            ended.add_metric([finish], loop.finished[finish])
        yield ended
        gauges = {"waiting": len(loop.waiting), "active": len(loop.active)}
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"expertflow_requests_{name}", f"Requests {name}.", value=value)
