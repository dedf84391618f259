"""The policy driver without a predictor: whoever has the values, evictions are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from runtime.cache.expert_cache import ExpertCache
from runtime.cache.policies import POLICIES
from runtime.cache.policy import DeviceRule, Policy
from runtime.cache.rules.hot_set import HotSet
from runtime.cache.rules.lfru import LFRU
from runtime.cache.rules.reuse import Reuse
from runtime.cuda.decode.experts import experts_call as experts
from runtime.cuda.decode.policy_driver import PolicyDriver
from tests.helpers.device_twins import Twin

LAYERS, EXPERTS, TOP_K, SLOTS = 2, 12, 3, 8


def made(kind: type[Policy]) -> Policy:
    """A policy of which no two values are ever equal: ties go to the lower slot, and the slots
    of one call's missing experts are not in the same order on a device.
    """
    if kind is HotSet:
        hot_set = HotSet(LAYERS, EXPERTS, calls=())
        hot_set.values[:] = np.random.default_rng(1).random(LAYERS * EXPERTS)
        return hot_set
    policy = kind(LAYERS, EXPERTS)
    if isinstance(policy, Reuse):
        policy._means[:] += np.random.default_rng(1).random(LAYERS * EXPERTS) * 1e-3
    if isinstance(policy, LFRU):
        policy._uses[:] = np.random.default_rng(1).random(LAYERS * EXPERTS)
        policy._revalue()
    return policy


def draw(random: np.random.Generator, tokens: int) -> np.ndarray:
    """Routes [L, B, K] in which a few experts are used most."""
    rates = 1 / np.arange(1, EXPERTS + 1)
    chosen = [
        random.choice(EXPERTS, TOP_K, replace=False, p=rates / rates.sum())
        for _ in range(LAYERS * tokens)
    ]
    return np.array(chosen).reshape(LAYERS, tokens, TOP_K)


def run_on_host(cache: ExpertCache, routes_LBK: np.ndarray) -> None:
    """A step as the CPU backend and the simulator run it."""
    cache.policy.begin_step(None)
    for layer, ids in enumerate(routes_LBK):
        list(cache.waves(layer, np.unique(ids)))


def residents(key_of_slot: Any) -> set[int]:
    return set(key_of_slot.tolist()) - {-1}


@pytest.mark.parametrize("is_served", [False, True], ids=["generated", "served"])
@pytest.mark.parametrize(
    "kind",
    [HotSet, Reuse, *(p for p in POLICIES.values() if p.rule is DeviceRule.STAMP)],
    ids=lambda p: p.name,
)
def test_captured_steps_evict_what_the_host_would(
    kind: type[Policy], is_served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time a prompt on the host, and captured steps after it."""
    monkeypatch.setattr(experts, "FETCHERS", 2)
    twin = Twin(made(kind), num_slots=SLOTS)
    unread: Any = None
    driver = PolicyDriver(twin.cache.policy, twin.device_cache, unread, None)
    host, random = ExpertCache(LAYERS, EXPERTS, SLOTS, made(kind)), np.random.default_rng(2)
    from_host = twin.cache.policy.rule.is_from_host
    assert driver.runs_ahead != from_host, "the host's values need the routes of the last step"
    for _ in range(3):
        twin.device_cache.download()
        prompt_LBK = draw(random, 2)
        run_on_host(twin.cache, prompt_LBK)
        run_on_host(host, prompt_LBK)
        twin.device_cache.upload()
        for _ in range(6):
            routes_LBK = draw(random, 1)
            driver.begin_served_step(None) if is_served else driver.begin_step()
            twin.call.begin_step()
            for layer, ids in enumerate(routes_LBK):
                twin.call._run_plan(layer, torch.from_numpy(ids))
            (driver.end_served_step if is_served else driver.end_step)(routes_LBK)
            run_on_host(host, routes_LBK)
            assert residents(twin.device_cache.key_of_slot) == residents(host.key_of_slot)
