"""The part of a torch profile that lanes are made of: GPU work, graphs, waits of the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.lanes.kinds import WAITING
from benchmarks.lanes.spans import Span

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
LAUNCH = "cudaGraphLaunch"


class GpuEvent(NamedTuple):
    """One kernel, or one copy by the copy engine. Microseconds on the clock of `Profile`."""

    name: str
    start: float
    length: float


class Profile(NamedTuple):
    """All that happened while the profiler ran, in microseconds of Unix time less `origin`."""

    work: Sequence[GpuEvent] = ()
    """By start."""
    graphs: Sequence[float | None] = ()
    """For each launched CUDA graph, in order, the start of its first event; None without events."""
    waits: Sequence[Span] = ()
    """When the host thread waited for the GPU."""


def read_profile(trace: dict[str, Any], origin: float) -> Profile:
    """Read a Chrome trace of torch's profiler. origin: Unix time of 0, in microseconds.

    Raises ValueError for a trace that does not say when it began.
    """
    if "baseTimeNanoseconds" not in trace:
        raise ValueError("the profile has no baseTimeNanoseconds: its times cannot be placed")
    events = [event for event in trace["traceEvents"] if event.get("ph", "X") == "X"]
    shift = trace["baseTimeNanoseconds"] / 1e3 - origin
    work = sorted((e for e in events if e.get("cat") in GPU_WORK), key=lambda event: event["ts"])
    calls = [event for event in events if event.get("cat") in CALLS]
    starts: dict[int, float] = {}
    for event in work:
        starts.setdefault(event["args"].get("correlation"), event["ts"] + shift)
    launches = sorted(
        (call for call in calls if call["name"].startswith(LAUNCH)), key=lambda call: call["ts"]
    )
    return Profile(
        [GpuEvent(event["name"], event["ts"] + shift, event["dur"]) for event in work],
        [starts.get(launch["args"].get("correlation")) for launch in launches],
        _waits(calls, work, shift),
    )


def _waits(calls: list[dict[str, Any]], work: list[dict[str, Any]], shift: float) -> list[Span]:
    """Calls of the busiest thread that return when the GPU has done something.

    They are those that say so, and copies to memory that is not pinned.
    """
    if not calls:
        return []
    host = Counter(call["tid"] for call in calls).most_common(1)[0][0]
    blocking = {
        event["args"].get("correlation") for event in work
        if "DtoH" in event["name"] and "Pageable" in event["name"]
    }  # fmt: skip
    return [
        Span(call["ts"] + shift, call["dur"], WAITING)
        for call in calls
        if call["tid"] == host
        and ("Synchronize" in call["name"] or call["args"].get("correlation") in blocking)
    ]
