"""Host time of a step of the cache's policy: `python -m benchmarks.cache.policy_cost`.

A step is `begin_step` with a forecast and one `touch` per layer, without the cache's own search for
victims.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from routing.cli import run
from runtime.cache.forecast import Forecast
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """Time a step of predicted reuse."""

    layers: int = 48
    """MoE layers."""
    experts: int = 128
    """Experts per layer."""
    top_k: int = 8
    """Experts per token."""
    steps: int = 2_000
    """Steps to time."""


def seconds_of_a_step(policy: Policy, forecast: Forecast, used: list[np.ndarray]) -> float:
    """Wall-clock time of one step."""
    start = time.perf_counter()
    policy.begin_step(forecast)
    for layer, experts in enumerate(used):
        policy.touch(layer, experts)
    return time.perf_counter() - start


def main(settings: CostSettings) -> None:
    """Print the median and the 90th percentile, of the values alone and of a whole step."""
    generator = np.random.default_rng(0)
    shape = settings.layers, settings.experts
    planes = np.sort(generator.random((4, *shape), np.float32), axis=0)
    forecast = Forecast(*planes)
    used = [
        np.sort(generator.permutation(settings.experts)[: settings.top_k])
        for _ in range(settings.layers)
    ]
    policy = PredictedReuse(*shape, horizon=4)
    for name, calls in (("values", []), ("values and touches", used)):
        taken = sorted(seconds_of_a_step(policy, forecast, calls) for _ in range(settings.steps))
        print(
            f"{name}, {shape[0]} x {shape[1]}: median {1e3 * statistics.median(taken):.3f} ms, "
            f"90 % within {1e3 * taken[int(0.9 * len(taken))]:.3f} ms"
        )


if __name__ == "__main__":
    run(main, CostSettings, prog="python -m benchmarks.cache.policy_cost")
