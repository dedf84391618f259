"""Ranges of experts: a wide call runs them one after the other, each out of the same slots.

A call that needs a large part of the slots at once leaves little that could hit in other layers.
With U experts in a call, of S slots at most

    (S - U) / (L * E - U)

of the experts can hit where layers use all they have, as U slots always hold what just ran. In n
ranges that is U / n: a range may take the slots of those before it. Ranges are whole parts of the
sum over experts (`Blocks.parts`), so that no bit of the result depends on their number.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

COUNTS = 1, 2, 4, 8
"""Numbers of ranges to choose from."""
RANGE_BYTES = 3 << 20
"""What the link could carry while a further range is planned and its last experts run: four
launches more a layer, and a shorter one of each kernel."""


class Range(NamedTuple):
    """Experts first .. end - 1, which are summed as `num_parts` parts from `first_part` on."""

    first: int
    end: int
    first_part: int
    num_parts: int


def ranges(num_experts: int, num_parts: int, count: int) -> list[Range]:
    """`count` ranges of as many parts each; fewer where there are fewer experts than parts."""
    span, each = triton.cdiv(num_experts, num_parts), triton.cdiv(num_parts, count)
    starts = [part for part in range(0, num_parts, each) if part * span < num_experts]
    ends = [*starts[1:], num_parts]
    return [
        Range(start * span, min(end * span, num_experts), start, end - start)
        for start, end in zip(starts, ends, strict=True)
    ]


def most_used(chosen: list[Range], most_routed: int) -> int:
    """The most experts that one range can need, of a call that routes tokens to `most_routed`."""
    return min(most_routed, max(one.end - one.first for one in chosen))


def choose_ranges(
    num_experts: int, num_parts: int, most_routed: int, *, num_keys: int, num_slots: int,
    block_bytes: int,
) -> list[Range]:  # fmt: skip
    """The ranges that fit the slots and save most bytes beyond what their launches cost.

    most_routed: experts that a call can route tokens to. num_keys: experts of all layers.
    block_bytes: of one expert.
    """
    most_routed = min(most_routed, num_experts)
    counts = [count for count in COUNTS if num_parts % count == 0]
    choices = [ranges(num_experts, num_parts, count) for count in counts]

    def saved(chosen: list[Range]) -> float:
        needed = most_used(chosen, most_routed)
        share = (num_slots - needed) / max(num_keys - needed, 1)
        return most_routed * block_bytes * share - len(chosen) * RANGE_BYTES

    fitting = [one for one in choices if most_used(one, most_routed) <= num_slots]
    return max(fitting or choices[-1:], key=saved)
