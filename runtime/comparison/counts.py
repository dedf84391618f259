"""Counts of each step of a run: of one contender, at one cache size.

N steps of one token each, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from runtime.cache.belady import Calls
from runtime.comparison.contenders import Simulated
from runtime.simulation.comparison import Contender
from runtime.simulation.link_model import Machine, PrefetchPlan, Timeline

PLANS: tuple[PrefetchPlan, ...] = ("none", "priced")


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """What a contender did, step by step; all [N]. None where it does not apply."""

    loads: np.ndarray
    """Experts that were not resident when needed, without prefetching."""
    ms: np.ndarray | None = None
    """Modelled time without prefetching."""
    found_k: np.ndarray | None = None
    """Used experts among as many of the highest forecast in their layers as were used there."""
    found_c: np.ndarray | None = None
    """Used experts among the C of highest forecast or value in their layers."""
    ms_priced: np.ndarray | None = None
    """Modelled time with priced prefetching; of its transfers:"""
    timely: np.ndarray | None = None
    late: np.ndarray | None = None
    prefetched: np.ndarray | None = None


def requests_of(calls: Sequence[Calls]) -> np.ndarray:
    """Experts that each step needs, [N]."""
    return np.array([sum(len(experts) for _, experts in step) for step in calls])


def count_contender(
    contender: Contender,
    calls: Sequence[Calls],
    empties: np.ndarray,
    shape: tuple[int, int],
    num_slots: int,
    machine: Machine,
) -> StepCounts:
    """Run a contender without prefetching and, where it predicts, with priced prefetches.

    empties: bool [N], the steps before which the cache is emptied; the policy keeps what it knows.
    """
    found = _ranked(contender, calls, shape, num_slots)

    def run(plan: PrefetchPlan) -> np.ndarray:
        return _timeline(contender, calls, empties, shape, num_slots, machine, plan)

    plain_NJ = run("none")
    counts = {"loads": plain_NJ[:, 1], "ms": plain_NJ[:, 0], **found}
    if contender.predicts:
        priced_NJ = run("priced")
        counts |= {
            "ms_priced": priced_NJ[:, 0],
            "timely": priced_NJ[:, 2],
            "late": priced_NJ[:, 3],
            "prefetched": priced_NJ[:, 4],
        }
    return StepCounts(**counts)


def _timeline(
    contender: Contender,
    calls: Sequence[Calls],
    empties: np.ndarray,
    shape: tuple[int, int],
    num_slots: int,
    machine: Machine,
    plan: PrefetchPlan,
) -> np.ndarray:
    """[N, 5]: milliseconds, demanded, timely, late and prefetched experts of each step."""
    policy = contender.policy()
    timeline = Timeline(policy, shape, num_slots, machine, plan)
    counts_NJ = np.zeros((len(calls), 5))
    for n, step in enumerate(calls):
        if empties[n]:
            timeline = Timeline(policy, shape, num_slots, machine, plan)
        before = astuple(timeline.counts)
        ahead = None if contender.ahead_TLDE is None else contender.ahead_TLDE[n]
        timeline.step(contender.forecasts[n], step, ahead)
        counts_NJ[n] = np.subtract(astuple(timeline.counts), before)
    return counts_NJ


def _ranked(
    contender: Contender, calls: Sequence[Calls], shape: tuple[int, int], num_slots: int
) -> dict[str, np.ndarray]:
    """Used experts that were ranked high enough before each step ran.

    By the forecast of the step; without one, by the values of the policy, for `found_c` alone.
    """
    depth = depth_of(num_slots, shape)
    policy = contender.policy()
    found_k, found_c = np.zeros(len(calls)), np.zeros(len(calls))
    for n, step in enumerate(calls):
        forecast = contender.forecasts[n]
        values_LE = policy.values.reshape(shape) if forecast is None else forecast.this_LE
        order_LE = np.argsort(-values_LE, axis=-1, kind="stable")
        rank_LE = np.empty_like(order_LE)
        np.put_along_axis(rank_LE, order_LE, np.arange(shape[1])[None], axis=-1)
        for layer, experts in step:
            ranks = rank_LE[layer, experts]
            found_k[n] += np.count_nonzero(ranks < len(experts))
            found_c[n] += np.count_nonzero(ranks < depth)
        if forecast is None:
            policy.begin_step(None)
            for layer, experts in step:
                policy.touch(layer, experts)
    with_forecast = contender.forecasts[0] is not None
    return {"found_c": found_c, **({"found_k": found_k} if with_forecast else {})}


def depth_of(num_slots: int, shape: tuple[int, int]) -> int:
    """C: the experts of a layer that the cache holds on average, at least one."""
    return max(num_slots // shape[0], 1)


def count_simulation(
    simulation: Simulated, calls: Sequence[Calls], empties: np.ndarray
) -> StepCounts | None:
    """Run a cache of another kind; None where the cache would have to be emptied on the way."""
    if empties.any():
        return None
    loads = np.zeros(len(calls))
    for n, step in enumerate(calls):
        before = simulation.loads
        simulation.step(None, step)
        loads[n] = simulation.loads - before
    return StepCounts(loads=loads)
