"""Speed and traffic of decoding, from timings and counts to the figures of a row."""

from __future__ import annotations

import statistics

from benchmarks.common.link import link_efficiency
from benchmarks.systems.row import Row
from benchmarks.systems.workload import Timings


def fill_speed(row: Row, timings: Timings, bandwidth: float | None) -> None:
    """Fill in the row. bandwidth: of the link, in bytes a second; None without a link."""
    row.first_token_ms = statistics.median(timings.first_token_s) * 1e3
    row.steps = len(timings.step_s)
    if not row.steps:
        return
    step_s, tokens = statistics.fmean(timings.step_s), row.steps * row.arm.batch
    row.step_ms, row.tokens_per_s = step_s * 1e3, row.arm.batch / step_s
    row.step_ms_median = statistics.median(timings.step_s) * 1e3
    counts = timings.decode
    if not counts.hits + counts.misses:
        return
    row.hit_rate = counts.hits / (counts.hits + counts.misses)
    row.bytes_per_token = counts.bytes_moved / tokens
    row.wasted_per_token = counts.bytes_wasted / tokens
    needed = counts.bytes_needed / row.steps
    row.link_efficiency = link_efficiency(needed, step_s, bandwidth)
    row.floor_ms = None if bandwidth is None else needed / bandwidth * 1e3
