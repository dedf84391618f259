"""Chrome traces like those of torch's profiler, of captured decode steps and of a prompt on a GPU.

Lengths are like an H200's with the shape of OLMoE-7B: 9.5 MB an expert, 49 GB/s by kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BASE_NS = 1_790_857_026_000_000_000
HOST, PREDICTOR_THREAD = 100, 101
EXPERT_BYTES = 9_486_336
BANDWIDTH = 55e9
FETCH_US, COMPUTE_US = 193.0, 17.0
"""Of an expert: fetched by kernels, and computed."""
AT_NATIVE = "void at::native::vectorized_elementwise_kernel<8, at::native::BFloat16>"
MODEL_KERNELS = ("nvjet_sm90_tst_64x8", AT_NATIVE, "_normalise", "attend_blocks", AT_NATIVE)


class Trace:
    """A trace that grows. Times are microseconds after `start_us` of Unix time."""

    def __init__(self, start_us: float) -> None:
        self._shift = start_us - BASE_NS / 1e3
        self._events: list[dict[str, Any]] = []

    def json(self) -> dict[str, Any]:
        """The trace as the profiler writes it, flow arrows and names of processes among it."""
        other: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {}}]
        return {"baseTimeNanoseconds": BASE_NS, "traceEvents": other + self._events}

    def work(
        self, name: str, start: float, length: float, launch: int, *, stream: int = 7
    ) -> float:
        """Add a kernel or a copy; returns its end."""
        category = {"Memcpy": "gpu_memcpy", "Memset": "gpu_memset"}.get(name.split()[0], "kernel")
        args = {"correlation": launch, "stream": stream}
        self._add(name, category, start, length, args, tid=stream)
        return start + length

    def call(
        self, name: str, start: float, length: float, launch: int = 0, *, thread: int = HOST
    ) -> None:
        """Add a call of CUDA's."""
        self._add(name, "cuda_runtime", start, length, {"correlation": launch}, tid=thread)

    def _add(
        self, name: str, category: str, start: float, length: float, args: dict[str, Any], tid: int
    ) -> None:
        self._events.append(
            {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid,
             "ts": start + self._shift, "dur": length, "args": args}
        )  # fmt: skip


def add_step(
    trace: Trace, start: float, launch: int, missed_L: Sequence[int], *,
    prefetch: bool = False, unknown: str | None = None,
) -> float:  # fmt: skip
    """Add a captured step, and the copy of its outcome; returns its end.

    prefetch: a kernel on a second stream copies for the next layer. unknown: a kernel a layer.
    """
    at = trace.work("Memset (Device)", start, 1.0, launch)
    for layer, missed in enumerate(missed_L):
        for name in (*MODEL_KERNELS * 5, *([unknown] if unknown else [])):
            at = trace.work(name, at + 1.0, 3.0, launch)
        at = trace.work("plan", at + 1.0, 7.0, launch)
        at = trace.work("gate_up", at + 1.0, max(30.0, 10 + missed * FETCH_US), launch)
        if prefetch and layer + 1 < len(missed_L):
            picked = trace.work("pick", at - 20.0, 14.0, launch, stream=9)
            trace.work("fetch", picked + 8.0, 120.0, launch, stream=9)
        at = trace.work("gate_up", at + 1.0, 3 + missed * COMPUTE_US, launch)
        at = trace.work("down", at + 1.0, 17.0, launch)
    at = trace.work("nvjet_sm90_tst_384x8_64x4_2x1_v_bz_TNT", at + 1.0, 58.0, launch)
    return trace.work("Memcpy DtoH (Device -> Pinned)", at + 6.0, 2.0, launch + 1)


def decode_trace(
    start_us: float, missed_SL: Sequence[Sequence[int]], **options: Any
) -> tuple[Trace, list[float]]:
    """Steps one after the other, each launched while the one before runs; and their arrivals.

    options: of `add_step`.
    """
    trace, at, arrivals = Trace(start_us), 200.0, []
    trace.call("cudaGraphLaunch", 100.0, 45.0, 10)
    for step, missed_L in enumerate(missed_SL):
        begun, at = at, add_step(trace, at, 10 * (step + 1), missed_L, **options)
        if step + 1 < len(missed_SL):
            trace.call("cudaGraphLaunch_v10000", begun + 150, 45.0, 10 * (step + 2))
        trace.call("cudaEventSynchronize", begun + 230, at - begun - 230)
        trace.call("cudaMemcpyAsync", begun + 400, 12.0, 7, thread=PREDICTOR_THREAD)
        arrivals.append(at + 120)
        at += 15.0
    return trace, arrivals


def prompt_trace(
    start_us: float, missed_L: Sequence[int], *, host_us: float = 2400.0
) -> tuple[Trace, float]:
    """A prompt outside of graphs, each layer's copies beside its products; and its end.

    host_us: the host's time for a layer before it waits for the routes.
    """
    trace, at, link = Trace(start_us), 50.0, 0.0
    for layer, missed in enumerate(missed_L):
        for index in range(30):
            begun = at + index * host_us / 30
            trace.call("cudaLaunchKernel", begun, 5.0, layer * 1000 + index)
            trace.work(MODEL_KERNELS[index % 5], begun + 9.0, 14.0, layer * 1000 + index)
        at += host_us
        routed = layer * 1000 + 500
        trace.call("cudaMemcpyAsync", at, 60.0, routed)
        trace.work("Memcpy DtoH (Device -> Pageable)", at + 50, 2.0, routed)
        link = max(link, at + 90)
        for index in range(missed):
            name = "Memcpy HtoD (Pinned -> Device)"
            link = trace.work(name, link, EXPERT_BYTES / BANDWIDTH * 1e6, routed + index, stream=8)
        done = trace.work("unpack", link, 40.0, routed)
        for name in ("grouped_gate_up", "grouped_down", "combine"):
            done = trace.work(name, done, 90.0, routed)
        at += 300
    trace.call("cudaStreamSynchronize", at, done - at)
    return trace, done
