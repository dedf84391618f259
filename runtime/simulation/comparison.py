"""Contenders (a policy, with or without a predictor) and their results on the same tokens.

A result has recall, hit rate and loads. By the model of `runtime.simulation.link_model` it also has
the time of a token without prefetching, with the priced plan and with the greedy one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from routing.predictor_file.reader import PredictorFile
from runtime.cache.belady import Belady, Calls
from runtime.cache.forecast import Forecast
from runtime.cache.policies import LIVE_FREE_RULES, LRU, POLICIES, QUEUE_CACHES, LeastStale
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.hot_set import HotSet
from runtime.prediction.forecaster import Forecaster
from runtime.simulation.baselines import Baseline, Documents, used_by
from runtime.simulation.link_model import Machine, PrefetchPlan, Timeline, TimelineCounts
from runtime.simulation.replay import (
    BypassSimulation,
    QueueSimulation,
    Simulation,
    slots_of,
)
from runtime.simulation.trace_steps import TraceStep

PLANS: tuple[PrefetchPlan, ...] = ("none", "priced", "greedy")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run a cache: a policy and what it is told."""

    name: str
    policy: Callable[[], Policy]
    forecasts: Sequence[Forecast | None]
    """One a token; None where nothing is predicted."""
    ahead_TLDE: np.ndarray | None = None
    """Float16; what becomes known of a token's coming layers while it runs (`Timeline.step`)."""
    recall_this: float | None = None
    """Recall of the experts of the token itself."""
    recall_next: float | None = None
    """Recall of the experts of the next token."""
    recall_ahead: tuple[float, ...] = ()
    """By distance: recall of the experts of the layer that far ahead."""

    @property
    def predicts(self) -> bool:
        """True if there is anything to prefetch by."""
        return self.ahead_TLDE is not None or self.forecasts[0] is not None


@dataclass(frozen=True, kw_only=True)
class ContenderResult:
    """The result of one contender at one cache size."""

    name: str
    residency: float
    recall_this: float | None
    recall_next: float | None
    recall_ahead: tuple[float, ...]
    hit_rate: float
    loads_per_token: float
    ms_per_token: dict[str, float]
    """By prefetch plan."""
    prefetched: float = 0.0
    """Experts prefetched per token under the priced plan. Of these:"""
    timely: float = 0.0
    late: float = 0.0
    wasted: float = 0.0

    @property
    def saving(self) -> float | None:
        """The share of a token's time that the priced plan saves; None without a forecast."""
        if "priced" not in self.ms_per_token:
            return None
        return 1 - self.ms_per_token["priced"] / self.ms_per_token["none"]


def baseline_forecasts(
    baseline: Baseline, documents: Documents, num_experts: int
) -> Iterator[Forecast]:
    """The forecast of a baseline before each token."""
    for steps in documents:
        baseline.reset()
        for step, used_LE in zip(steps, used_by(steps, num_experts), strict=True):
            yield baseline.forecast(int(step.token_ids_T[0]))
            baseline.observe(used_LE)


def file_forecasts(file: PredictorFile, documents: Documents) -> Iterator[Forecast]:
    """The forecast that the runtime would make before each token."""
    forecaster = Forecaster(file)
    for steps in documents:
        forecaster.reset(1)
        for step in steps:
            yield forecaster.forecast(step.token_ids_T[None], step.positions_T[None])
            forecaster.observe(step.experts_TLK[-1:].astype(np.int64))


def predicting(
    name: str,
    forecasts: Sequence[Forecast],
    documents: Documents,
    shape: tuple[int, int],
    horizon: int,
) -> Contender:
    """A contender that evicts by predicted reuse, with the recall of its forecasts."""
    used = [used_by(steps, shape[1]) for steps in documents]
    heads = [
        np.stack(head) for head in zip(*((f.this_LE, f.next_LE) for f in forecasts), strict=True)
    ]
    follows = np.concatenate([np.arange(len(u)) < len(u) - 1 for u in used])
    used_TLE = np.concatenate(used)
    return Contender(
        name=name,
        policy=lambda: PredictedReuse(*shape, horizon=horizon),
        forecasts=forecasts,
        recall_this=recall(heads[0], used_TLE),
        recall_next=recall(heads[1][follows], np.roll(used_TLE, -1, axis=0)[follows]),
    )


def recall(scores_TLE: np.ndarray, used_TLE: np.ndarray) -> float:
    """Recall@K with K the number of experts used, averaged over the layers."""
    order_TLE = np.argsort(-scores_TLE, axis=-1, kind="stable")
    ranked_TLE = np.take_along_axis(used_TLE, order_TLE, axis=-1)
    within_TLE = np.arange(used_TLE.shape[-1]) < used_TLE.sum(-1, keepdims=True)
    return float(((ranked_TLE & within_TLE).sum((0, 2)) / used_TLE.sum((0, 2)).clip(1)).mean())


def without_forecast(
    shape: tuple[int, int], calls: Calls, counted: Calls, num_steps: int
) -> list[Contender]:
    """The policies without a forecast: the free rules, least stale, the hot set and Belady.

    calls: those to come, which Belady knows. counted: those that the hot set is made of.
    """
    nothing: list[Forecast | None] = [None] * num_steps
    policies: dict[str, Callable[[], Policy]] = {
        name: partial(POLICIES[name], *shape) for name in LIVE_FREE_RULES
    }
    policies[LeastStale.name] = partial(LeastStale, *shape)
    policies[HotSet.name] = partial(HotSet, *shape, calls=counted)
    policies[Belady.name] = partial(Belady, *shape, calls=calls)
    return [
        Contender(name=name, policy=policy, forecasts=nothing) for name, policy in policies.items()
    ]


def run_contender(
    contender: Contender,
    steps: Sequence[Calls],
    shape: tuple[int, int],
    residency: float,
    machine: Machine,
) -> ContenderResult:
    """Run one contender at one cache size, under every prefetch plan that it can follow.

    steps: the expert calls of each step. shape: (L, E).
    """
    slots = slots_of(residency, shape)
    plans = PLANS if contender.predicts else PLANS[:1]
    nothing = [None] * len(steps)
    aheads = nothing if contender.ahead_TLDE is None else contender.ahead_TLDE
    counts: dict[str, TimelineCounts] = {}
    for plan in plans:
        timeline = Timeline(contender.policy(), shape, slots, machine, plan)
        for forecast, calls, ahead in zip(contender.forecasts, steps, aheads, strict=True):
            timeline.step(forecast, calls, ahead)
        counts[plan] = timeline.counts
    requests = sum(len(experts) for calls in steps for _, experts in calls)
    priced, num_steps = counts.get("priced", TimelineCounts()), len(steps)
    return ContenderResult(
        name=contender.name,
        residency=residency,
        recall_this=contender.recall_this,
        recall_next=contender.recall_next,
        recall_ahead=contender.recall_ahead,
        hit_rate=1 - counts["none"].demanded / requests,
        loads_per_token=counts["none"].demanded / num_steps,
        ms_per_token={plan: of_plan.milliseconds / num_steps for plan, of_plan in counts.items()},
        prefetched=priced.prefetched / num_steps,
        timely=priced.timely / num_steps,
        late=priced.late / num_steps,
        wasted=priced.wasted / num_steps,
    )


def other_replays(
    steps: Sequence[Calls], shape: tuple[int, int], residency: float
) -> list[tuple[str, float]]:
    """Names and hit rates of replays by other rules.

    The rules with a cache of their own; an LRU that serves a call expert by expert, so that it may
    evict what the running call still needs; the optimum, which may stream experts through.
    """
    slots = slots_of(residency, shape)
    flat = [call for calls in steps for call in calls]
    singly, optimum = Simulation(LRU(*shape), *shape, slots), Belady(*shape, calls=flat)
    whole: list[QueueSimulation | BypassSimulation] = [
        *(QueueSimulation(cache(*shape, slots)) for cache in QUEUE_CACHES.values()),
        BypassSimulation(optimum, *shape, slots),
    ]
    for calls in steps:
        for simulation in whole:
            simulation.step(None, calls)
        singly.step(None, [(layer, one) for layer, experts in calls for one in experts[:, None]])
    return [
        (name, 1 - simulation.loads / simulation.requests)
        for name, simulation in [
            ("lru, one by one", singly),
            *((simulation.name, simulation) for simulation in whole),
        ]
    ]


def decode_steps(documents: Documents) -> list[TraceStep]:
    """The steps of all documents, in order."""
    return [step for steps in documents for step in steps]
