"""The one place that says how many slots a memory budget gives."""

from __future__ import annotations

import math
from typing import NamedTuple

from runtime.sizing.units import format_bytes, round_up
from runtime.weights.arena import expert_bytes
from runtime.weights.source import Source


class SlotBudget(NamedTuple):
    """Experts that fit, for each group of layers of one expert shape (`Source.groups`)."""

    plain: list[int]
    """Experts that fit as the model stores them."""
    num_experts: list[int]
    """Experts that there are."""
    host_bytes: int = 0
    """Bytes of the model's other weights that have to stay in host memory."""

    def slots(self, stored_share: float = 1.0) -> list[int]:
        """Slots of each group, where an expert in a slot takes `stored_share` of its own bytes."""
        pairs = zip(self.plain, self.num_experts, strict=True)
        return [min(int(plain / stored_share), count) for plain, count in pairs]


def slot_budget(
    memory: float | int, source: Source, *, reserved: int = 0, host_bytes: int = 0
) -> SlotBudget:
    """The slots that `memory` (of `units.parse_memory`) pays for.

    A fraction counts experts; bytes pay for the model's other weights first. Several groups share
    by the bytes of their experts. reserved: bytes of `memory` that something else needs (the
    key/value cache, workspaces). host_bytes: bytes of the other weights that stay in host memory.
    Raises ValueError when a group would get fewer slots than a layer's top-k.
    """
    counts, least = _counts(source), _least(source)
    total, fixed = total_expert_bytes(source), source.fixed_bytes - host_bytes
    fraction = memory if isinstance(memory, float) else (memory - reserved - fixed) / total
    slots = [min(int(count * fraction + 1e-9), count) for count in counts]
    if any(got < need for got, need in zip(slots, least, strict=True)):
        raise ValueError(
            f"memory={_say(memory)} leaves {max(min(slots), 0)} expert slots, but a token needs "
            f"{max(least)} in one layer; give at least "
            f"{math.ceil(_least_fraction(source) * 1e4) / 1e4} (a fraction of the experts) or "
            f"{round_up(least_bytes(source) + reserved - host_bytes)}"
        )
    return SlotBudget(slots, counts, host_bytes)


def total_expert_bytes(source: Source) -> int:
    """Bytes of all experts of all layers."""
    sizes = [expert_bytes(group.specs) for group in source.groups]
    return sum(size * count for size, count in zip(sizes, _counts(source), strict=True))


def least_bytes(source: Source) -> float:
    """The smallest budget: other weights, and slots for the top-k of one layer of each group."""
    spare = sum(expert_bytes(group.specs) for group in source.groups)
    return source.fixed_bytes + _least_fraction(source) * total_expert_bytes(source) + spare


def _counts(source: Source) -> list[int]:
    return [sum(source.layers[i].num_experts for i in group.layers) for group in source.groups]


def _least(source: Source) -> list[int]:
    return [max(source.layers[i].top_k for i in group.layers) for group in source.groups]


def _least_fraction(source: Source) -> float:
    return max(k / count for k, count in zip(_least(source), _counts(source), strict=True))


def _say(memory: float | int) -> str:
    return str(memory) if isinstance(memory, float) else format_bytes(memory)
