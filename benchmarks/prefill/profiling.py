"""A prompt under torch's profiler: where the host's time goes, and what is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
"""Calls that launch one kernel each."""
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def profile(run: Callable[[], Any], num_layers: int, rows: int = 25) -> None:
    """Print what one run takes, after another that is not looked at."""
    run()
    has_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * has_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    events = profiler.key_averages()
    print(events.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=50))
    if has_gpu:
        print(events.table(sort_by="self_cuda_time_total", row_limit=rows // 2,
                           max_name_column_width=50))  # fmt: skip
    launches = sum(event.count for event in events if event.key in LAUNCHES)
    waits = sum(event.count for event in events if event.key in WAITS)
    print(f"{launches / num_layers:.1f} launches a layer, {waits} host syncs in all", flush=True)
