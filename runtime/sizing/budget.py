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
    """Experts that fit where each takes `slot_bytes`."""
    num_experts: list[int]
    """Experts that there are."""
    slot_bytes: list[int]
    """Bytes of an expert in a slot, before it is packed."""
    host_bytes: int = 0
    """Bytes of the model's other weights that have to stay in host memory."""

    def slots(self, stored_share: float = 1.0) -> list[int]:
        """Slots of each group, where a packed expert takes `stored_share` of `slot_bytes`."""
        pairs = zip(self.plain, self.num_experts, strict=True)
        return [min(int(plain / stored_share), count) for plain, count in pairs]


def slot_budget(
    memory: float | int,
    source: Source,
    *,
    slot_bytes: list[int] | None = None,
    reserved: int = 0,
    host_bytes: int = 0,
) -> SlotBudget:
    """The slots that `memory` (of `units.parse_memory`) pays for.

    A fraction counts experts; bytes pay for the model's other weights first. Several groups share
    by the bytes of their experts. slot_bytes: of an expert in a slot, by group; by default those of
    its weights as the model has them, which are what a slot holds unless kernels decode. reserved:
    bytes of `memory` that something else needs (the key/value cache, workspaces). host_bytes: bytes
    of the other weights that stay in host memory.
    Raises ValueError when a group would get fewer slots than a layer's top-k.
    """
    counts, least, sizes = _counts(source), _least(source), slot_bytes or plain_bytes(source)
    total, fixed = total_expert_bytes(source, sizes), source.fixed_bytes - host_bytes
    fraction = memory if isinstance(memory, float) else (memory - reserved - fixed) / total
    slots = [min(int(count * fraction + 1e-9), count) for count in counts]
    if any(got < need for got, need in zip(slots, least, strict=True)):
        raise ValueError(
            f"memory={_say(memory)} leaves {max(min(slots), 0)} expert slots, but a token needs "
            f"{max(least)} in one layer; give at least "
            f"{math.ceil(_least_fraction(source) * 1e4) / 1e4} (a fraction of the experts) or "
            f"{round_up(least_bytes(source, sizes) + reserved - host_bytes)}"
        )
    return SlotBudget(slots, counts, sizes, host_bytes)


def plain_bytes(source: Source) -> list[int]:
    """Bytes of an expert's weights as the model has them, by group."""
    return [expert_bytes(group.specs) for group in source.groups]


def total_expert_bytes(source: Source, slot_bytes: list[int] | None = None) -> int:
    """Bytes of all experts of all layers in slots."""
    sizes = slot_bytes or plain_bytes(source)
    return sum(size * count for size, count in zip(sizes, _counts(source), strict=True))


def least_bytes(source: Source, slot_bytes: list[int] | None = None) -> float:
    """The smallest budget: other weights, and slots for the top-k of one layer of each group."""
    sizes = slot_bytes or plain_bytes(source)
    total = total_expert_bytes(source, sizes)
    return source.fixed_bytes + _least_fraction(source) * total + sum(sizes)


def _counts(source: Source) -> list[int]:
    return [sum(source.layers[i].num_experts for i in group.layers) for group in source.groups]


def _least(source: Source) -> list[int]:
    return [max(source.layers[i].top_k for i in group.layers) for group in source.groups]


def _least_fraction(source: Source) -> float:
    return max(k / count for k, count in zip(_least(source), _counts(source), strict=True))


def _say(memory: float | int) -> str:
    return str(memory) if isinstance(memory, float) else format_bytes(memory)
