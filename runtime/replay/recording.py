"""A recording: one document of a trace, replayed through a cache and through LRU beside it.

The caches, the policies and the order of steps are those of `runtime.simulation.replay`. Here they
also tell which experts each step missed, and which were gone after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from routing.predictor_file.reader import PredictorFile
from routing.shards import GENERATED, Document, TraceReader
from runtime.cache.belady import Belady, Call
from runtime.cache.forecast import Forecast
from runtime.cache.policies import FREE_RULES, LRU
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.reuse import Reuse
from runtime.simulation.replay import (
    QueueSimulation,
    Simulation,
    forecasts_of,
    free_rule,
    slots_of,
)
from runtime.simulation.trace_steps import TraceStep, document_steps

Keys = np.ndarray
"""int64 keys, layer * E + expert."""


@dataclass(frozen=True, kw_only=True)
class CacheRun:
    """What one cache did, step by step. It begins empty."""

    policy: str
    num_slots: int
    missed: list[Keys]
    """By step: the experts it had to load."""
    left: list[Keys]
    """By step: the experts that were resident before it, or loaded in it, and are not after it."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A document's steps, and what its caches did: the chosen one, then LRU if that is another."""

    document: Document
    steps: list[TraceStep]
    predicted_SLK: np.ndarray | None
    """int64: the K likeliest experts of each layer before each step; None without a predictor."""
    runs: list[CacheRun]


def record(
    reader: TraceReader,
    document: Document,
    *,
    policy: str | None = None,
    residency: float = 0.25,
    predictor: PredictorFile | None = None,
    decode_all: bool = False,
) -> Recording:
    """Replay a document. policy: by default that of `runtime.load`.

    Raises ValueError for a policy that is unknown, or lacks its predictor.
    """
    stack = reader.stack
    shape = stack.num_layers, stack.num_experts
    decode_all = decode_all or not (document.phase_T == GENERATED).any()
    steps = list(document_steps(document, stack.num_experts, decode_all=decode_all))
    forecasts = list(forecasts_of(steps, predictor))
    name = policy or (Reuse.name if predictor is None else PredictedReuse.name)
    runs = []
    for chosen in dict.fromkeys((name, LRU.name)):
        simulation = _simulation(chosen, shape, slots_of(residency, shape), steps, predictor)
        runs.append(run_cache(simulation, steps, forecasts))
    return Recording(
        document=document,
        steps=steps,
        predicted_SLK=None if predictor is None else likeliest(forecasts, stack.top_k),
        runs=runs,
    )


def _simulation(
    name: str,
    shape: tuple[int, int],
    num_slots: int,
    steps: Sequence[TraceStep],
    predictor: PredictorFile | None,
) -> Simulation | QueueSimulation:
    if name in FREE_RULES:
        return free_rule(name, shape, num_slots)
    if name == Belady.name:
        calls = [call for step in steps for call in step.calls()]
        return Simulation(Belady(*shape, calls=calls), *shape, num_slots)
    if name != PredictedReuse.name:
        known = ", ".join((*FREE_RULES, Belady.name, PredictedReuse.name))
        raise ValueError(f"--policy {name}: give one of {known}")
    if predictor is None:
        raise ValueError(f"--policy {name} needs --predictor, an ONNX file of this model")
    return Simulation(PredictedReuse(*shape, horizon=predictor.horizon), *shape, num_slots)


def run_cache(
    simulation: Simulation | QueueSimulation,
    steps: Sequence[TraceStep],
    forecasts: Sequence[Forecast | None],
) -> CacheRun:
    """Run all steps through one cache."""
    missed, left = [], []
    for step, forecast in zip(steps, forecasts, strict=True):
        before = simulation.residents()
        loads: list[Keys] = [np.zeros(0, np.int64)]
        simulation.step(forecast, _watched(step.calls(), simulation, loads))
        missed.append(np.concatenate(loads))
        left.append(np.setdiff1d(np.union1d(before, missed[-1]), simulation.residents()))
    return CacheRun(
        policy=simulation.name, num_slots=simulation.num_slots, missed=missed, left=left
    )


def _watched(
    calls: Iterable[Call], simulation: Simulation | QueueSimulation, loads: list[Keys]
) -> Iterator[Call]:
    """The calls; what is not resident when a cache takes one is added to `loads`."""
    for layer, experts in calls:
        loads.append(simulation.missing(layer, experts))
        yield layer, experts


def likeliest(forecasts: Sequence[Forecast | None], top_k: int) -> np.ndarray:
    """The `top_k` likeliest experts of every layer in each step, int64 [steps, L, K]."""
    probabilities_SLE = np.stack([forecast.this_LE for forecast in forecasts if forecast])
    return np.argpartition(probabilities_SLE, -top_k, axis=-1)[..., -top_k:]
