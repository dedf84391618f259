"""Rows of a comparison: the results of one arm, written as JSON and read back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from benchmarks.systems.arm import Arm


@dataclass(kw_only=True)
class ArmRow:
    """The result of one arm. A field that does not apply is None."""

    arm: Arm
    error: str | None = None
    """The reason why there are no results."""
    recorded_ms: float | None = None
    """Time of the step or prompt that was recorded, under the profiler."""
    not_recorded: str | None = None
    """The reason why no step could be recorded."""
    busy_ms: dict[str, float] = field(default_factory=dict)
    """In it, the time in which the link, each thread of the CPU, and the GPU worked; waiting is no
    work (benchmarks/lanes/lanes.py)."""
    least_ms: dict[str, float] = field(default_factory=dict)
    """Least time of a step or prompt that link, CPU and GPU allow; the largest is the bound
    (benchmarks/lanes/bound.py)."""
    of_bound: float | None = None
    """The bound / the time: 1 is as fast as it can be with these misses."""

    def to_json(self) -> dict[str, Any]:
        """The arm's name, its fields and the row's own, side by side."""
        values = asdict(self)
        return {"name": self.arm.name} | values.pop("arm") | values


@dataclass(kw_only=True)
class Row(ArmRow):
    """The results of decoding under one arm."""

    note: str | None = None
    load_s: float | None = None
    """Time to set the model up."""
    warm_up_s: float | None = None
    """The first few steps, with all capture and compilation."""
    total_s: float | None = None
    """The whole arm."""
    first_token_ms: float | None = None
    """Median time to the first token."""
    tokens_per_s: float | None = None
    """Decoded tokens of all sequences over the whole time of decoding."""
    step_ms: float | None = None
    """Mean time of a decode step, everything included."""
    step_ms_median: float | None = None
    steps: int | None = None
    peak_bytes: int | None = None
    """Peak of allocated GPU memory (torch.cuda.max_memory_allocated)."""
    held_bytes: int | None = None
    """GPU memory allocated before the arm began; it counts in the peak."""
    slots: int | None = None
    hit_rate: float | None = None
    bytes_per_token: float | None = None
    """Bytes moved to the device per decoded token, wasted prefetches included."""
    wasted_per_token: float | None = None
    link_efficiency: float | None = None
    """Needed bytes, as they cross the link / (measured bandwidth x step time)."""
    delivered: float | None = None
    """The same in bytes of unpacked experts. Above 1 is faster than the link could be without
    packing."""
    floor_ms: float | None = None
    """Time that the link alone takes for the needed bytes of a step."""
    recall: float | None = None
    prediction_ms: float | None = None
    decode_path: str | None = None
    logits: dict[str, str] = field(default_factory=dict)
    """Logits compared with those of each reference system, see `compare_logits`."""
    extra: dict[str, Any] = field(default_factory=dict)


Kind = TypeVar("Kind", bound=ArmRow)


def read_row(values: dict[str, Any], kind: type[Kind]) -> Kind:
    """Inverse of `to_json`. Of an older file, which lacks fields, these are at their defaults."""
    arm = Arm(**{f.name: values[f.name] for f in fields(Arm) if f.name in values})
    own = {f.name: values[f.name] for f in fields(kind) if f.name != "arm" and f.name in values}
    return kind(arm=arm, **own)
