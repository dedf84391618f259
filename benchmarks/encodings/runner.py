"""Runner of the encodings' arms: load, warm up, compare logits, generate, fill in the row."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common.coded_models import PLAIN, coded_bytes
from benchmarks.encodings.arms import CodedArm, groups
from benchmarks.encodings.report import print_row
from benchmarks.encodings.settings import EncodingSettings
from benchmarks.encodings.subject import CodedSubject, Loaded
from benchmarks.replay.passages import Passages
from benchmarks.systems.arm import decoding_as
from benchmarks.systems.logits import compare_logits
from benchmarks.systems.placement import free_memory
from benchmarks.systems.row import Row
from benchmarks.systems.speed import fill_speed
from benchmarks.systems.workload import Timings, Workload

ARM_S, COMPILE_S = 10.0, 45.0
"""Seconds that an arm takes beside loading, and more if it compiles."""
SETTLING_S = 30.0
"""Most seconds until the CPU's share is settled."""
UNSETTLED = "being prepared", "being tried"
PACKED_PER_S, CODED_PER_S = 2.0e9, 3.0e9
"""Bytes of experts that are drawn and pinned in a second: packed to 12 bits, and as they are."""


class EncodingRunner:
    """Runs arms one after the other within a time budget."""

    def __init__(self, settings: EncodingSettings, subject: CodedSubject) -> None:
        self.settings, self.subject = settings, subject
        self._start = time.perf_counter()
        self._references: dict[CodedArm, Tensor] = {}

    def run_all(self, arms: list[CodedArm], on_rows: Callable[[list[Row]], None]) -> list[Row]:
        """A row for each arm, in their order. `on_rows` gets all rows so far after each."""
        rows: list[Row] = []

        def add(row: Row) -> None:
            print_row(row)
            rows.append(row)
            on_rows(rows)

        for group in groups(arms):
            self._run(group, add)
        return rows

    def _run(self, group: list[CodedArm], add: Callable[[Row], None]) -> None:
        """Run arms on one loaded model. An error costs the rows of this model that are left."""
        waiting = list(group)
        spent = time.perf_counter() - self._start
        if spent + expected_s(group) > self.settings.budget_seconds:
            error: str | None = f"skipped: {spent:.0f} s of the time budget were spent"
        else:
            error = self._run_loaded(waiting, add)
            free_memory()  # of a model that nothing holds any more
        for arm in waiting:
            add(Row(arm=arm, error=error))

    def _run_loaded(self, waiting: list[CodedArm], add: Callable[[Row], None]) -> str | None:
        """Run the arms, each of which leaves the list with its row. Returns the error."""
        start, held = time.perf_counter(), _begin_memory()
        try:
            with self.subject.loaded(waiting[0], self._context) as loaded:
                load_s = time.perf_counter() - start
                while waiting:
                    row = Row(arm=waiting[0], load_s=load_s, held_bytes=held)
                    with decoding_as(waiting[0]):
                        self._measure(waiting[0], loaded, row)
                    add(row)
                    waiting.pop(0)
        except Exception as error:  # one arm of many: the others still count
            return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        return None

    @property
    def _context(self) -> int:
        return self.settings.prompt + self.settings.tokens

    def _passages(self, arm: CodedArm) -> list[Passages]:
        """The warm-up's, then those that are timed."""
        text = self.subject.text(arm)
        count = self.settings.documents + 1
        return [text.passages(1, self._context, first=index) for index in range(count)]

    def _measure(self, arm: CodedArm, loaded: Loaded, row: Row) -> None:
        settings, start = self.settings, time.perf_counter()
        workload = Workload(
            device=self.subject.device,
            prompt=settings.prompt,
            replay=loaded.replay,
            counts=loaded.running.counts,
            max_seconds=settings.arm_seconds,
        )
        first, *timed = self._passages(arm)
        row.note = self.subject.text(arm).routes
        row.warm_up_s = workload.warm_up(loaded.model, first, settings.tokens)
        if arm.cpu_share:
            row.warm_up_s += self._settle(workload, loaded, first)
        steps = min(settings.check_steps, settings.tokens)
        self._compare(arm, workload.logits(loaded.model, first, steps), row)
        loaded.running.reset()
        warm_up_bytes = _begin_steps()
        timings, began = Timings(), time.perf_counter()
        for passages in timed:
            if not timings.step_s or time.perf_counter() - began < settings.arm_seconds:
                workload.run(loaded.model, passages, timings)
        fill_speed(row, timings, loaded.bandwidth)
        loaded.running.finish(row)
        row.extra["steps_bytes"] = steps_bytes = _peak_memory()
        row.peak_bytes = steps_bytes and max(steps_bytes, warm_up_bytes or 0)
        row.total_s = (row.load_s or 0.0) + time.perf_counter() - start

    def _settle(self, workload: Workload, loaded: Loaded, passages: Passages) -> float:
        """Generate until it is known what the CPU's share shall be. Returns the seconds."""
        start, engine = time.perf_counter(), loaded.model.expertflow
        while (spent := time.perf_counter() - start) < SETTLING_S:
            if not any(word in engine.cpu_share for word in UNSETTLED):
                break
            workload.warm_up(loaded.model, passages, self.settings.tokens)
        return spent

    def _compare(self, arm: CodedArm, logits: Tensor, row: Row) -> None:
        """Compare with the first arm of this encoding, text and way of computing."""
        key = replace(arm, residency="", policy=None, prefetch=False, cpu_share=False)
        if key in self._references:
            row.logits["expertflow"] = compare_logits(logits, self._references[key])
        else:
            self._references[key] = logits


def expected_s(group: list[CodedArm]) -> float:
    """Seconds that the arms of one loaded model take, roughly."""
    first = group[0]
    speed = PACKED_PER_S if first.encoding == PLAIN else CODED_PER_S
    loading = coded_bytes(first.shape, first.encoding) / speed
    return loading + ARM_S + (COMPILE_S if first.compile else 0.0)


def _begin_memory() -> int | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _begin_steps() -> int | None:
    """The peak until now: from here on, that of the steps alone is taken."""
    peak = _peak_memory()
    if peak is not None:
        torch.cuda.reset_peak_memory_stats()
    return peak


def _peak_memory() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
