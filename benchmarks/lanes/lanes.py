"""Three lanes over the time of one step or prompt.

    link   copies by the copy engine, and kernels that do nothing but copy: as long as they last.
           Experts that `gate_up` fetches: the time that the link needs for their bytes at the
           bandwidth measured in this run, from the kernel's start on, and no longer than it lasts
    CPU    a row for each thread. The host thread works whenever it does not wait in a CUDA call
    GPU    kernels by kind. A kernel that fetches is split: for the link's part of it the GPU waits
           (it runs residents meanwhile, which is not counted as work), the rest is experts' work

A row never overlaps itself. Of two kernels at a time, the row shows the one that began first;
waiting is shown only while no other kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.lanes.kinds import (
    COPIED,
    FETCHED,
    GPU,
    HOST,
    HOST_WORK,
    LINK,
    PREDICTION,
    PREDICTOR,
    PREFETCHED,
    WAITING,
    kind_of,
)
from benchmarks.lanes.profile import GpuEvent, Profile
from benchmarks.lanes.recorder import HostTime
from benchmarks.lanes.spans import Span, apart, by_kind, clipped, joined, without

FINEST = 2000
"""Gaps shorter than this part of the whole are not kept: no picture shows them."""
FETCHER, PLANNER = "gate_up", "plan"
"""The first launch of the one after the other fetches what the layer misses."""


class Fetches(NamedTuple):
    """What the experts' kernels of a step fetched."""

    us: float = 0.0
    """Time that the link needs for it at its measured bandwidth."""
    missed_L: Sequence[int] = ()
    """Experts, by layer."""


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """One step or prompt."""

    us: float
    """Its time."""
    rows: dict[str, list[Span]]
    """Link, threads of the CPU, GPU; by start. Gaps that no picture shows are closed."""
    busy_us: dict[str, dict[str, float]]
    """Exact time of each row by kind."""

    def busy_ms(self) -> dict[str, float]:
        """Milliseconds in which each row worked; waiting is no work."""
        return {
            row: sum(us for kind, us in kinds.items() if kind != WAITING) / 1e3
            for row, kinds in self.busy_us.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Compact: of each row and kind, start and length of one span after the other."""
        rows: dict[str, dict[str, list[float]]] = {}
        for name, row in self.rows.items():
            kinds = rows.setdefault(name, {})
            for span in row:
                kinds.setdefault(span.kind, []).extend(
                    (round(span.start, 1), round(span.length, 1))
                )
        return {"us": self.us, "rows": rows, "busy_us": self.busy_us}


def read_lanes(values: dict[str, Any]) -> Lanes:
    """Inverse of `to_json`, but for rounding."""
    rows = {
        name: apart(
            Span(start, length, kind)
            for kind, numbers in kinds.items()
            for start, length in zip(numbers[::2], numbers[1::2], strict=True)
        )
        for name, kinds in values["rows"].items()
    }
    return Lanes(us=values["us"], rows=rows, busy_us=values["busy_us"])


def build_lanes(
    profile: Profile, times: Iterable[HostTime], start: float, end: float, *,
    fetches: Fetches, on_gpu: bool,
) -> Lanes:  # fmt: skip
    """The lanes between two moments (microseconds, of the profile's and the times' clock)."""
    length = end - start
    work = [
        event for event in profile.work if event.start < end and event.start + event.length > start
    ]
    link, gpu = gpu_rows(work, fetches)
    rows = {LINK: link, **_cpu_rows(profile, times, start, end, on_gpu), GPU: gpu}
    if not on_gpu:
        del rows[GPU]
        rows[LINK] = _loads(times)
    exact = {name: apart(clipped(row, start, end)) for name, row in rows.items()}
    return Lanes(
        us=length,
        rows={name: joined(row, length / FINEST) for name, row in exact.items()},
        busy_us={name: by_kind(row) for name, row in exact.items()},
    )


def gpu_rows(work: Sequence[GpuEvent], fetches: Fetches) -> tuple[list[Span], list[Span]]:
    """Of GPU events by start, the link's spans and the GPU's."""
    link_us = _link_us(work, fetches)
    link, gpu, waiting = [], [], []
    for index, event in enumerate(work):
        kind, needed = kind_of(event.name), link_us.get(index, 0.0)
        if kind in (COPIED, PREFETCHED, FETCHED):
            link.append(Span(event.start, event.length, kind))
            waiting += [link[-1]._replace(kind=WAITING)] if kind == FETCHED else []
            continue
        if needed:
            link.append(Span(event.start, needed, FETCHED))
            waiting.append(Span(event.start, needed, WAITING))
        gpu.append(Span(event.start + needed, event.length - needed, kind))
    return link, gpu + without(waiting, gpu)


def _link_us(work: Sequence[GpuEvent], fetches: Fetches) -> dict[int, float]:
    """Microseconds of the link within each kernel that fetches, by its place in `work`.

    By what each layer missed. Where a step has not one such kernel a layer, by their lengths.
    """
    fetching, planned = [], False
    for index, event in enumerate(work):
        if event.name == FETCHER and planned:
            fetching.append(index)
        if event.name in (FETCHER, PLANNER):
            planned = event.name == PLANNER
    weights: Sequence[float] = fetches.missed_L
    if len(weights) != len(fetching):
        weights = [work[index].length for index in fetching]
    total = sum(weights)
    if not fetches.us or not total:
        return {}
    return {
        index: min(fetches.us * weight / total, work[index].length)
        for index, weight in zip(fetching, weights, strict=True)
    }


def _cpu_rows(
    profile: Profile, times: Iterable[HostTime], start: float, end: float, on_gpu: bool
) -> dict[str, list[Span]]:
    """Rows by thread. What the engine times, except for steps and loads, has a row by its name."""
    rows: dict[str, list[Span]] = {HOST: []}
    taken = list(profile.waits)
    for one in times:
        span = Span(one.start, one.length, one.name)
        if one.name == "predict":
            rows.setdefault(PREDICTOR, []).append(span._replace(kind=PREDICTION))
        elif one.name not in ("step", "load"):
            rows.setdefault(one.name, []).append(span)
        if one.is_main and one.name != "step" and not (on_gpu and one.name == "load"):
            taken.append(span)
    rows[HOST] = without([Span(start, end - start, HOST_WORK)], taken)
    return rows


def _loads(times: Iterable[HostTime]) -> list[Span]:
    """Without a GPU the host thread copies experts itself."""
    return [Span(one.start, one.length, COPIED) for one in times if one.name == "load"]
