"""The cache's books on the device: the same state as `ExpertCache`, as tensors that kernels keep.

    host (ExpertCache, Policy)          device (Books)
    slot_of_key, key_of_slot  int64     int32
    policy.values             LRU, LFU  values (float64)   rule CLOCK, COUNT
    policy.table()            others    before, after      rule TABLE

One side holds the truth at a time: `upload` before a captured step, `download` before a forward
pass outside of them.
"""

from __future__ import annotations

import numpy as np
import torch

from runtime.cache.expert_cache import ExpertCache
from runtime.cache.policies import LFU, LRU
from runtime.cuda.kernels.plan import CLOCK, COUNT, TABLE


class DeviceCache:
    """Device tensors for `cache`. L layers, E experts, S slots."""

    def __init__(self, cache: ExpertCache, num_layers: int, device: torch.device) -> None:
        self._cache = cache
        self.num_layers, self.num_experts = num_layers, cache.num_experts
        keys = num_layers * cache.num_experts
        self.slot_of_key = torch.zeros(keys, dtype=torch.int32, device=device)
        self.key_of_slot = torch.zeros(cache.num_slots, dtype=torch.int32, device=device)
        self.values, self.before, self.after = torch.zeros(
            3, keys, dtype=torch.float64, device=device
        )
        self.clock = torch.zeros(1, dtype=torch.float64, device=device)
        self.on_device = False

    @property
    def rule(self) -> int:
        """How the planning kernel values residents."""
        rules = {LRU: CLOCK, LFU: COUNT}
        return int(rules.get(type(self._cache.policy), TABLE).value)

    @property
    def is_table(self) -> bool:
        """Whether the values come from the host, as the policy's table."""
        return self.rule == TABLE.value

    def begin_step(self) -> None:
        """What a rule does once a step, captured with it."""
        if self.rule == COUNT.value:
            self.values.mul_(LFU.DECAY)

    def upload(self) -> None:
        """Make the device's books the truth."""
        policy = self._cache.policy
        self.slot_of_key.copy_(torch.from_numpy(self._cache.slot_of_key))
        self.key_of_slot.copy_(torch.from_numpy(self._cache.key_of_slot))
        self.values.copy_(torch.from_numpy(policy.values))
        if isinstance(policy, LRU):
            self.clock.fill_(policy.clock)
        table = policy.table()
        if table is not None:
            self.write_table(*table)
        self.on_device = True

    def write_table(self, before: np.ndarray, after: np.ndarray) -> None:
        """New values of every key: before and after its layer has run, float64 [L * E]."""
        self.before.copy_(torch.from_numpy(before), non_blocking=True)
        self.after.copy_(torch.from_numpy(after), non_blocking=True)

    def download(self) -> None:
        """Make the host's books the truth. Waits for the device."""
        if not self.on_device:
            return
        policy = self._cache.policy
        self._cache.adopt(self.key_of_slot.cpu().numpy())
        if not self.is_table:
            policy.values[:] = self.values.cpu().numpy()
        if isinstance(policy, LRU):
            policy.clock = int(self.clock)
        self.on_device = False

    def check_integrity(self) -> None:
        """Assert that both device tables say the same: no slot with two owners, no key twice."""
        slots, keys = self.slot_of_key.cpu().numpy(), self.key_of_slot.cpu().numpy()
        resident = np.flatnonzero(slots >= 0)
        owned = np.flatnonzero(keys >= 0)
        assert len(resident) == len(owned)
        assert np.array_equal(keys[slots[resident]], resident)
        assert np.array_equal(slots[keys[owned]], owned)
