"""The bound of a configuration: the least time that link, GPU and CPU allow.

    link   bytes that the step or prompt needs over the link (wasted prefetches are not in them) /
           the highest bandwidth of pinned copies measured in this run
    GPU    time in which kernels ran (without waiting for the link) where every expert is resident:
           of the arm of this run with the same batch, prompt and compilation. Where there is none,
           of the arm itself, what ran in the shadow of a fetch not counted
    CPU    share of the recorded time in which the host thread, or the CPU's experts, worked x the
           arm's own time: profiling slows the host, and this does not count it. The predictor is
           left out, since no step waits for it

The bound is the largest: the time if all three overlapped perfectly. It takes the arm's bytes as
they are: fewer misses would lower it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

from benchmarks.lanes.kinds import GPU, PREDICTOR, lane_of
from benchmarks.systems.arm import FULL
from benchmarks.systems.row import ArmRow

AnyRow = TypeVar("AnyRow", bound=ArmRow)


class Measured(NamedTuple):
    """What an arm's row says, the same for steps and prompts."""

    ms: float | None
    """Time of a step or prompt, without profiling."""
    link_ms: float | None
    """Time that the link needs for its bytes; None without a link."""
    twin: Hashable
    """Equal for arms that differ in residency and policy only."""


def set_bounds(rows: Sequence[AnyRow], measured: Callable[[AnyRow], Measured]) -> None:
    """Fill in `least_ms` and `of_bound` of the rows that were recorded, where there is a link."""
    resident = {
        measured(row).twin: _gpu_ms(row, measured(row))
        for row in rows
        if row.arm.residency == FULL and row.recorded_ms
    }
    for row in rows:
        known = measured(row)
        if row.recorded_ms is None or known.ms is None or known.link_ms is None:
            continue
        row.least_ms = {
            "link": known.link_ms,
            "CPU": _cpu_ms(row, known),
            "GPU": resident.get(known.twin, _gpu_ms(row, known)),
        }
        row.of_bound = max(row.least_ms.values()) / known.ms


def _gpu_ms(row: ArmRow, known: Measured) -> float:
    busy = row.busy_ms.get(GPU, 0.0)
    return busy if known.ms is None else min(busy, known.ms)


def _cpu_ms(row: ArmRow, known: Measured) -> float:
    assert row.recorded_ms and known.ms
    working = [
        ms for name, ms in row.busy_ms.items() if lane_of(name) == "CPU" and name != PREDICTOR
    ]
    return max(working, default=0.0) / row.recorded_ms * known.ms
