"""Timeline of one decode step on the GPU, kernel by kernel, from torch's profiler."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

GPU_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
KINDS = {
    "transfer": r"memcpy|^fetch",
    "plan": r"^(plan|pick|router_probabilities)",
    "experts": r"^(gate_up|down)|grouped_mm|groupproblem",
    "attention": r"fmha|flash|attention|sdpa|softmax",
    "matrix product": r"gemm|gemv|cutlass|nvjet|splitk|cublas",
}
OTHER = "other"


class GpuEvent(NamedTuple):
    """One kernel, or one copy by the copy engine."""

    name: str
    kind: str
    stream: int
    start_us: float
    """Time since the step's first event."""
    duration_us: float


def profile_step(generate: Callable[[], object]) -> list[GpuEvent]:
    """Run `generate` (a few decode steps) under the profiler; return the events of one CUDA graph.

    Raises ValueError if no CUDA graph was launched.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        generate()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(path))
        return last_graph(json.loads(path.read_text())["traceEvents"])


def last_graph(events: list[dict[str, Any]]) -> list[GpuEvent]:
    """Events of the last graph launch that has any, by start time."""
    launches = [e["args"]["correlation"] for e in events if e.get("name") == "cudaGraphLaunch"]
    of_launch: dict[int, list[dict[str, Any]]] = {correlation: [] for correlation in launches}
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if event.get("cat") in GPU_CATEGORIES and correlation in of_launch:
            of_launch[correlation].append(event)
    whole = [of_launch[correlation] for correlation in launches if of_launch[correlation]]
    if not whole:
        raise ValueError("the profile holds no CUDA graph: the step did not run as one")
    step = sorted(whole[-1], key=lambda event: event["ts"])
    return [
        GpuEvent(
            event["name"],
            kind_of(event["name"]),
            int(event["args"]["stream"]),
            event["ts"] - step[0]["ts"],
            event["dur"],
        )
        for event in step
    ]


def kind_of(name: str) -> str:
    """The kind of a kernel, one of `KINDS` or `OTHER`, by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lower)), OTHER)


def busy_us(events: list[GpuEvent]) -> dict[str, float]:
    """Total duration of each kind's kernels, in microseconds."""
    kinds = dict.fromkeys(event.kind for event in events)
    return {k: sum(e.duration_us for e in events if e.kind == k) for k in kinds}
