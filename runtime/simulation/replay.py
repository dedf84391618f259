"""Cache policies replayed over recorded steps, without a model.

The policies and the cache are the runtime's own, driven as the runtime drives them. So the hit
rates equal those of a live run over the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from routing.predictor_file.reader import PredictorFile
from runtime.cache.belady import Belady, Call, Calls
from runtime.cache.expert_cache import FREE, ExpertCache
from runtime.cache.forecast import Forecast
from runtime.cache.policies import FREE_RULES, POLICIES, QUEUE_CACHES
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.hot_set import HotSet
from runtime.cache.rules.queue_cache import QueueCache
from runtime.prediction.forecaster import Forecaster
from runtime.simulation.trace_steps import TraceStep


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """The result of one policy at one cache size."""

    policy: str
    residency: float
    """Cache size, as a fraction of all experts."""
    slots: int
    requests: int
    """Experts that calls needed; one is counted once a call."""
    loads: int
    """Experts that were not resident when needed."""
    loads_per_token: float
    hit_rate: float
    """NaN without any request."""


class Simulation:
    """A cache under one policy that counts its requests and loads."""

    def __init__(self, policy: Policy, num_layers: int, num_experts: int, num_slots: int) -> None:
        self.name = policy.name
        self.num_experts, self.num_slots = num_experts, num_slots
        self._policy = policy
        self.cache = ExpertCache(num_layers, num_experts, num_slots, policy)
        self.requests, self.loads = 0, 0

    def step(self, forecast: Forecast | None, calls: Iterable[Call]) -> None:
        """Serve the expert calls of one forward pass."""
        self._policy.begin_step(forecast)
        for layer, experts in calls:
            for lookup in self.cache.waves(layer, experts):
                self.loads += int(np.count_nonzero(lookup.missed))
            self.requests += len(experts)

    def residents(self) -> np.ndarray:
        """The keys of all residents, int64."""
        return np.flatnonzero(self.cache.slot_of_key != FREE)

    def missing(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """The keys of those of a layer's experts that are not resident."""
        keys = layer * self.num_experts + experts
        return keys[self.cache.slot_of_key[keys] == FREE]


class QueueSimulation:
    """A rule with a cache of its own, counting its requests and loads."""

    def __init__(self, cache: QueueCache) -> None:
        self.name, self.num_slots = cache.name, cache.num_slots
        self.num_experts = cache.num_experts
        self._cache = cache
        self.requests, self.loads = 0, 0

    def step(self, forecast: Forecast | None, calls: Iterable[Call]) -> None:
        """Serve the expert calls of one forward pass."""
        for layer, experts in calls:
            self.loads += self._cache.request(layer, experts)
            self.requests += len(experts)

    def residents(self) -> np.ndarray:
        """The keys of all residents, int64."""
        return np.array(sorted(self._cache.residents()), np.int64)

    def missing(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """The keys of those of a layer's experts that are not resident."""
        keys, held = layer * self.num_experts + experts, self._cache.residents()
        return keys[[key not in held for key in keys.tolist()]]


class BypassSimulation:
    """A cache that may stream an expert through, counting its requests and loads.

    After each call the experts of highest value stay, whether they are new or old. With `Belady`
    this is the optimum.
    """

    def __init__(self, policy: Policy, num_layers: int, num_experts: int, num_slots: int) -> None:
        self.name = f"{policy.name}+bypass"
        self.num_slots = num_slots
        self._policy = policy
        self._resident = np.zeros((num_layers, num_experts), bool)
        self.requests, self.loads = 0, 0

    def step(self, forecast: Forecast | None, calls: Iterable[Call]) -> None:
        """Serve the expert calls of one forward pass."""
        self._policy.begin_step(forecast)
        for layer, experts in calls:
            self._policy.touch(layer, experts)
            self.loads += int(np.count_nonzero(~self._resident[layer, experts]))
            self.requests += len(experts)
            self._resident[layer, experts] = True
            self._shrink()

    def _shrink(self) -> None:
        """Evict the experts of lowest value until the rest fit."""
        held = np.flatnonzero(self._resident)
        excess = len(held) - self.num_slots
        if excess > 0:
            values = self._policy.values[held]
            self._resident.reshape(-1)[held[np.argpartition(values, excess)[:excess]]] = False


AnySimulation = Simulation | QueueSimulation | BypassSimulation


def simulate(
    steps: Sequence[TraceStep],
    shape: tuple[int, int],
    *,
    residency: Sequence[float],
    predictor: PredictorFile | None = None,
    fit: Calls | None = None,
) -> list[ReplayResult]:
    """Replay `steps` under every policy at every residency. shape: (L, E).

    The policies are the free rules and Belady; the hot set if there are calls to count (`fit`), and
    predicted reuse if there is a predictor. Those three also run with bypass; for the hot set that
    means experts pinned for good.
    """
    step_calls = [list(step.calls()) for step in steps]
    calls = [call for step in step_calls for call in step]
    informed = _informed(shape, calls, predictor, fit)
    running = {share: _simulations(shape, share, informed) for share in residency}
    for forecast, called in zip(forecasts_of(steps, predictor), step_calls, strict=True):
        for simulations in running.values():
            for simulation in simulations:
                simulation.step(forecast, called)
    num_tokens = sum(len(step.token_ids_T) for step in steps)
    return [
        _result(simulation, share, num_tokens)
        for share, simulations in running.items()
        for simulation in simulations
    ]


def _informed(
    shape: tuple[int, int], calls: Calls, predictor: PredictorFile | None, fit: Calls | None
) -> list[Callable[[], Policy]]:
    """The policies that know more than their own requests, in the order of the report."""
    policies: list[Callable[[], Policy]] = []
    if fit is not None:
        policies.append(partial(HotSet, *shape, calls=fit))
    if predictor is not None:
        policies.append(partial(PredictedReuse, *shape, horizon=predictor.horizon))
    return [*policies, partial(Belady, *shape, calls=calls)]


def free_rules(shape: tuple[int, int], num_slots: int) -> list[Simulation | QueueSimulation]:
    """One simulation for each of `FREE_RULES`."""
    return [free_rule(name, shape, num_slots) for name in FREE_RULES]


def free_rule(name: str, shape: tuple[int, int], num_slots: int) -> Simulation | QueueSimulation:
    """The simulation of one of `FREE_RULES`. shape: (L, E)."""
    if name in QUEUE_CACHES:
        return QueueSimulation(QUEUE_CACHES[name](*shape, num_slots))
    return Simulation(POLICIES[name](*shape), *shape, num_slots)


def slots_of(share: float, shape: tuple[int, int]) -> int:
    """The slots that a share of all experts gives. shape: (L, E)."""
    return max(int(share * shape[0] * shape[1] + 1e-9), 1)


def _simulations(
    shape: tuple[int, int], share: float, informed: Sequence[Callable[[], Policy]]
) -> list[AnySimulation]:
    """One simulation for each policy at one cache size."""
    num_slots = slots_of(share, shape)
    plain = [Simulation(policy(), *shape, num_slots) for policy in informed]
    bypass = [BypassSimulation(policy(), *shape, num_slots) for policy in informed]
    return [*free_rules(shape, num_slots), *plain, *bypass]


def forecasts_of(
    steps: Sequence[TraceStep], predictor: PredictorFile | None
) -> Iterator[Forecast | None]:
    """The forecast that the runtime would make before each step; None without a predictor."""
    if predictor is None:
        yield from (None for _ in steps)
        return
    forecaster = Forecaster(predictor)
    for step in steps:
        if step.first:
            forecaster.reset(1)
        yield forecaster.forecast(step.token_ids_T[None], step.positions_T[None])
        forecaster.observe(step.experts_TLK[-1:].astype(np.int64))


def _result(simulation: AnySimulation, share: float, num_tokens: int) -> ReplayResult:
    return ReplayResult(
        policy=simulation.name,
        residency=share,
        slots=simulation.num_slots,
        requests=simulation.requests,
        loads=simulation.loads,
        loads_per_token=simulation.loads / num_tokens,
        hit_rate=1 - simulation.loads / simulation.requests if simulation.requests else math.nan,
    )
