"""The policy driver without a predictor: the host's values reach the device step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from runtime.cache.expert_cache import ExpertCache
from runtime.cache.policies import POLICIES
from runtime.cache.policy import DeviceRule, Policy
from runtime.cache.rules.lfru import LFRU
from runtime.cuda.decode.experts import experts_call as experts
from runtime.cuda.decode.policy_driver import PolicyDriver
from tests.helpers.device_twins import Twin

LAYERS, EXPERTS, TOP_K, SLOTS = 2, 12, 3, 8


def made(kind: type[Policy]) -> Policy:
    """A policy of which no two values are ever equal."""
    policy = kind(LAYERS, EXPERTS)
    if isinstance(policy, LFRU):
        policy._uses[:] = np.random.default_rng(1).random(LAYERS * EXPERTS)
        policy._revalue()
    return policy


@pytest.mark.parametrize(
    "kind", [p for p in POLICIES.values() if p.rule is DeviceRule.STAMP], ids=lambda p: p.name
)
def test_generated_steps_under_a_stamped_rule_evict_what_the_host_would(
    kind: type[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "FETCHERS", 2)
    twin = Twin(made(kind), num_slots=SLOTS)
    unread: Any = None
    driver = PolicyDriver(twin.cache.policy, twin.device_cache, unread, None)
    host, random = ExpertCache(LAYERS, EXPERTS, SLOTS, made(kind)), np.random.default_rng(2)
    assert not driver.runs_ahead, "a step needs the routes of the last one"
    for _ in range(10):
        rates = 1 / np.arange(1, EXPERTS + 1)
        routes_LBK = np.stack([
            random.choice(EXPERTS, (1, TOP_K), replace=False, p=rates / rates.sum())
            for _ in range(LAYERS)
        ])  # fmt: skip
        driver.begin_step()
        twin.call.begin_step()
        for layer, ids in enumerate(routes_LBK):
            twin.call._run_plan(layer, torch.from_numpy(ids))
            list(host.waves(layer, np.unique(ids)))
            residents = set(twin.device_cache.key_of_slot.tolist()) - {-1}
            assert residents == set(host.key_of_slot.tolist()) - {-1}
        driver.end_step(routes_LBK)
        host.policy.begin_step(None)
