"""Running an arm: set the model up, measure, put the model back.

An arm that fails costs its own row and nothing else: the row then gives the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

import runtime
from benchmarks.systems.arm import Arm
from benchmarks.systems.counts import NOTHING, Counts, read_counts
from benchmarks.systems.placement import restored
from benchmarks.systems.row import Row


class Running(NamedTuple):
    """A model set up for an arm."""

    options: dict[str, Any]
    """Further arguments of generate."""
    stats: Any = None
    """The engine's `Stats`; None for other systems."""
    counts: Callable[[], Counts] = lambda: NOTHING
    reset: Callable[[], None] = lambda: None
    """Reset the counters, after the warm-up."""
    finish: Callable[[Row], None] = lambda row: None
    """Add to the row what only this system knows."""


SetUp = Callable[[], AbstractContextManager[Running]]


def run_arm(arm: Arm, model: Any, set_up: SetUp, measure: Callable[[Running, Row], None]) -> Row:
    """Set the model up, measure, and put the model back; an error goes into the row."""
    row, start = Row(arm=arm), time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        row.held_bytes = torch.cuda.memory_allocated()
    try:
        with restored(model, experts=arm.system != "expertflow"), set_up() as running:
            row.load_s = time.perf_counter() - start
            measure(running, row)
            running.finish(row)
            if torch.cuda.is_available():
                row.peak_bytes = torch.cuda.max_memory_allocated()
    except Exception as error:  # one arm of many: the others still count
        row.error = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
    row.total_s = time.perf_counter() - start
    return row


@contextmanager
def offloaded(model: Any, **options: Any) -> Iterator[Running]:
    """ExpertFlow's engine on the model; `options` go to `runtime.load`."""
    with runtime.load(model, **options).expertflow as engine:
        yield of_engine(engine)
        engine.check_integrity()


def of_engine(engine: Any) -> Running:
    """A model that this engine runs."""
    return Running(
        {},
        stats=engine.stats(),
        counts=lambda: read_counts(engine.stats()),
        reset=lambda: engine.stats().reset(),
        finish=lambda row: _finish(engine, row),
    )


def _finish(engine: Any, row: Row) -> None:
    stats = engine.stats()
    row.slots = stats.num_slots
    row.recall = _none_for_nan(stats.recall)
    row.prediction_ms = _none_for_nan(stats.prediction_ms_median)
    row.decode_path = engine.decode_path
    row.extra["resident_share"] = stats.num_slots / stats.total_experts
    row.extra["packing"] = stats.packing
    row.extra["prefetching"] = engine.prefetching
    row.extra["cpu_share"] = engine.cpu_share
    row.extra["computed_on_cpu"] = stats.computed_on_cpu
    if row.link_efficiency is not None:
        row.delivered = row.link_efficiency / stats.packing


def _none_for_nan(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if value != value else value
