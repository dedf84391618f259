"""Host time of a step of the cache's policy: `python -m benchmarks.cache.policy_cost`.

A step is `begin_step` with a forecast and one `touch` per layer, or the routes of all layers at
once (captured and served steps), without the cache's own search for victims. The table of a policy
that a device evaluates from one is timed apart, and so is the session memory, which the forecast
holds. The rules with a cache of their own are timed with their search, at a quarter of the experts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from routing.cli import run
from routing.topology import Layer, Stack
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LIVE_FREE_RULES, POLICIES, QUEUE_CACHES
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.queue_cache import QueueCache
from runtime.prediction.session_memory import Place, SessionMemory


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """Time a step of every policy that needs no future."""

    layers: int = 48
    """MoE layers."""
    experts: int = 128
    """Experts per layer."""
    top_k: int = 8
    """Experts per token."""
    steps: int = 2_000
    """Steps to time."""


Routes = Sequence[Sequence[np.ndarray]]
"""The experts of each layer of each step, ascending."""


def routes_of(settings: CostSettings) -> Routes:
    """Random routes: popular experts of each layer come back often."""
    generator = np.random.default_rng(0)
    rates = 1 / np.arange(1, settings.experts + 1)
    orders = [generator.permutation(settings.experts) for _ in range(settings.layers)]
    return [
        [
            np.sort(order[np.argsort(generator.random(settings.experts) / rates)[: settings.top_k]])
            for order in orders
        ]
        for _ in range(64)
    ]


def forecasts_of(settings: CostSettings) -> Sequence[Forecast]:
    """Random forecasts, with what a session memory might recall."""
    generator = np.random.default_rng(0)
    shape = settings.layers, settings.experts
    planes = np.sort(generator.random((64, 3, 4, *shape), np.float32), axis=2)
    return [Forecast(*heads[0])._replace(remembered=heads[1:]) for heads in planes]


def timed(step: Callable[[Any], object], routes: Sequence[Any], steps: int) -> str:
    """The median and the 90th percentile of the wall-clock time of a step."""
    taken = []
    for number in range(steps):
        start = time.perf_counter()
        step(routes[number % len(routes)])
        taken.append(1e3 * (time.perf_counter() - start))
    taken.sort()
    return f"median {statistics.median(taken):.3f} ms, 90 % within {taken[int(0.9 * steps)]:.3f} ms"


def advance(policy: Policy, forecast: Forecast | None, used: Sequence[np.ndarray]) -> None:
    """One step of a policy."""
    policy.begin_step(forecast)
    for layer, experts in enumerate(used):
        policy.touch(layer, experts)


def advance_at_once(policy: Policy, step: tuple[Forecast, np.ndarray]) -> None:
    """One step whose routes [L, K] become known together, as those of captured and served steps."""
    forecast, used = step
    policy.begin_step(forecast)
    policy.touch_routes(used)


def remembering(settings: CostSettings) -> Callable[[np.ndarray], None]:
    """The session memory's part of a token: its cue, what it recalls, and its routes [L, K]."""
    layer = Layer("", settings.experts, settings.top_k)
    memory = SessionMemory(Stack(name="decoder", layers=(layer,) * settings.layers), horizon=4)
    shape = settings.layers, settings.experts
    logits_LE = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    place: Place = None

    def step(used: np.ndarray) -> None:
        nonlocal place
        cue = memory.cue(place, int(used[0, 0]), logits_LE)
        memory.recall(cue)
        place = memory.add(cue, used)

    return step


def table_of(policy: Policy, used: Sequence[np.ndarray]) -> object:
    """The table of a policy, whatever is used."""
    return policy.table()


def request(cache: QueueCache, used: Sequence[np.ndarray]) -> None:
    """One step of a rule with a cache of its own."""
    for layer, experts in enumerate(used):
        cache.request(layer, experts)


def main(settings: CostSettings) -> None:
    """Print the time of a step of every policy, and of its table."""
    shape = settings.layers, settings.experts
    forecasts, routes = forecasts_of(settings), routes_of(settings)
    forecast = forecasts[0]
    print(f"{shape[0]} x {shape[1]}, {settings.top_k} experts a token")
    reuse = PredictedReuse(*shape, horizon=4)
    print(
        "predicted, values alone:",
        timed(lambda _: reuse.begin_step(forecast), routes, settings.steps),
    )
    whole = [np.stack(used) for used in routes]
    steps = list(zip(forecasts, whole, strict=True))
    print(
        "predicted, routes at once:", timed(partial(advance_at_once, reuse), steps, settings.steps)
    )
    print("session memory:", timed(remembering(settings), whole, settings.steps))
    policies = [POLICIES[name](*shape) for name in LIVE_FREE_RULES]
    for policy in (*policies, reuse):
        known = forecast if policy.needs_forecast else None
        step = partial(advance, policy, known)
        print(f"{policy.name}:", timed(step, routes, settings.steps))
        if policy.table() is not None:
            print(
                f"{policy.name}, table:",
                timed(partial(table_of, policy), routes, settings.steps),
            )
    for name, kind in QUEUE_CACHES.items():
        cache = kind(*shape, shape[0] * shape[1] // 4)
        print(f"{name}, with its search:", timed(partial(request, cache), routes, settings.steps))


if __name__ == "__main__":
    run(main, CostSettings, prog="python -m benchmarks.cache.policy_cost")
