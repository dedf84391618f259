"""The device cache: the slot table and the policy's values as tensors that kernels update.

    host (ExpertCache, Policy)           device (DeviceCache)
    slot_of_key, key_of_slot  int64      int32
    policy.device_state()     float64    values             rule CLOCK, COUNT, CYCLE
                                         before, after      rule TABLE, STAMP, CYCLE
    policy.clock              int        clock, float64     rule CLOCK

Experts that are sent ahead have slots before they are whole. Of each slot, `rest` is the number of
chunks that are still to come, `sent` of those that came and were not used yet (`kernels.transfer`).
Only steps that prefetch know of them; before anything else runs, `drop_parts` frees those slots.

One side holds the truth at a time: `upload` before a captured step, `download` before a forward
pass outside of them.
"""

from __future__ import annotations

import numpy as np
import torch

from runtime.cache.expert_cache import FREE, ExpertCache
from runtime.cache.policy import DeviceRule
from runtime.cuda.kernels.plan import CLOCK, COUNT, CYCLE, STAMP, TABLE

RULES = {
    DeviceRule.CLOCK: CLOCK,
    DeviceRule.COUNT: COUNT,
    DeviceRule.TABLE: TABLE,
    DeviceRule.STAMP: STAMP,
    DeviceRule.CYCLE: CYCLE,
}
"""The planning kernel's constant of each rule."""


class DeviceCache:
    """Device tensors for `cache`. L layers, E experts, S slots."""

    def __init__(self, cache: ExpertCache, num_layers: int, device: torch.device) -> None:
        self._cache = cache
        self.num_layers, self.num_experts = num_layers, cache.num_experts
        keys = num_layers * cache.num_experts
        self.slot_of_key = torch.zeros(keys, dtype=torch.int32, device=device)
        self.key_of_slot = torch.zeros(cache.num_slots, dtype=torch.int32, device=device)
        self.values = torch.zeros(keys, dtype=torch.float64, device=device)
        self.table = torch.zeros(2, keys, dtype=torch.float64, device=device)
        self.before, self.after = self.table
        self.clock = torch.zeros(1, dtype=torch.float64, device=device)
        self.sent_ahead = torch.zeros(2, cache.num_slots, dtype=torch.int32, device=device)
        self.rest, self.sent = self.sent_ahead
        self.has_parts = False
        """Whether a slot may hold a part of an expert."""
        self.on_device = False

    @property
    def rule(self) -> int:
        """How the planning kernel values residents: CLOCK, COUNT, TABLE, STAMP or CYCLE."""
        return int(RULES[self._cache.policy.rule].value)

    def begin_step(self) -> None:
        """Apply the rule's change of a new step; it is captured with the step."""
        if self.rule == COUNT.value:
            self.values.mul_(self._cache.policy.fade)

    def upload(self) -> None:
        """Make the device's tables the truth."""
        policy = self._cache.policy
        self.slot_of_key.copy_(torch.from_numpy(self._cache.slot_of_key))
        self.key_of_slot.copy_(torch.from_numpy(self._cache.key_of_slot))
        values, table = policy.device_state()
        self.values.copy_(torch.from_numpy(values))
        self.clock.fill_(policy.clock)
        if table is not None:
            self.write_table(*table)
        self.sent_ahead.zero_()
        self.has_parts, self.on_device = False, True

    def drop_parts(self) -> None:
        """Free the slots of experts that are not whole. Only enqueues."""
        if self.has_parts:
            is_part_N = (self.slot_of_key >= 0) & (self.rest[self.slot_of_key.clamp(min=0)] > 0)
            self.slot_of_key.masked_fill_(is_part_N, FREE)
            self.key_of_slot.masked_fill_(self.rest > 0, FREE)
            self.sent_ahead.zero_()
            self.has_parts = False

    def resident(self) -> np.ndarray:
        """Whether each expert is in a slot, whole, bool [L * E]. Waits for the device."""
        slots, rest = self.slot_of_key.cpu().numpy(), self.rest.cpu().numpy()
        whole: np.ndarray = (slots != FREE) & (rest[slots] == 0)
        return whole

    def write_table(self, before: np.ndarray, after: np.ndarray) -> None:
        """Write new values of every key, float64 [L * E]: both vectors of a policy's `table`."""
        self.before.copy_(torch.from_numpy(before), non_blocking=True)
        self.after.copy_(torch.from_numpy(after), non_blocking=True)

    def download(self) -> None:
        """Make the host's tables the truth. Waits for the device."""
        if not self.on_device:
            return
        self.drop_parts()
        self._cache.adopt(self.key_of_slot.cpu().numpy())
        table = self.table.cpu().numpy()
        self._cache.policy.resume(self.values.cpu().numpy(), int(self.clock), table)
        self.on_device = False

    def check_integrity(self) -> None:
        """Assert that both device tables say the same: no slot with two owners, no key twice, no
        part of an expert without an owner.
        """
        slots, keys = self.slot_of_key.cpu().numpy(), self.key_of_slot.cpu().numpy()
        resident = np.flatnonzero(slots >= 0)
        owned = np.flatnonzero(keys >= 0)
        assert len(resident) == len(owned)
        assert np.array_equal(keys[slots[resident]], resident)
        assert np.array_equal(slots[keys[owned]], owned)
        rest, sent = self.sent_ahead.cpu().numpy()
        assert (rest >= 0).all()
        assert (sent >= 0).all()
        assert not (rest + sent)[keys < 0].any()
