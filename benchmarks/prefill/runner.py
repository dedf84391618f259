"""Runner of the prefill arms: every prompt length, against its bounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.lanes.bound import Measured, set_bounds
from benchmarks.lanes.record import record_prompt
from benchmarks.prefill.profiling import profile
from benchmarks.prefill.report import print_row
from benchmarks.prefill.row import PrefillRow
from benchmarks.prefill.settings import PrefillSettings
from benchmarks.replay.text_replay import TextReplay
from benchmarks.systems.arm import FULL, Arm
from benchmarks.systems.row import Row
from benchmarks.systems.running import Running, run_arm
from benchmarks.systems.subject import Pass, Subject
from benchmarks.systems.workload import Timings, Workload

SLOW_REPEATS = 2


class PrefillRunner:
    """Runs arms one after the other on one subject, within a time budget."""

    def __init__(self, settings: PrefillSettings, subject: Subject) -> None:
        self.settings, self.subject = settings, subject
        self._start = time.perf_counter()
        self._compute_ms: dict[int, float] = {}
        self.lanes: dict[str, dict[str, Any]] = {}
        """By arm and prompt length (`PrefillRow.recording`), the lanes of one prompt as JSON."""
        self._logits: dict[int, torch.Tensor] = {}
        """Of the first prompt of each length, with every expert resident."""

    def run_all(self, arms: list[Arm]) -> list[PrefillRow]:
        """The rows of every arm, with their bounds."""
        rows = [row for arm in arms for row in self.run(arm)]
        set_bounds(rows, _measured)
        return rows

    def run(self, arm: Arm) -> list[PrefillRow]:
        """A row for each prompt length, printed when the arm has ended."""
        rows = [PrefillRow(arm=arm, prompt=prompt) for prompt in self.settings.prompts]
        error = self._fill(arm, rows)
        for row in rows:
            row.error = error
            print_row(row)
        return rows

    def _fill(self, arm: Arm, rows: list[PrefillRow]) -> str | None:
        """Measure all lengths of one arm; return its error, or None."""
        if time.perf_counter() - self._start > self.settings.budget_seconds:
            return "skipped: the time budget was spent"
        passes = {row.prompt: self._passes(arm, row.prompt) for row in rows}
        longest = max(passes) + 1
        replay = self.subject.replay(arm, longest)

        def measure(running: Running, _: Row) -> None:
            for row in rows:
                self._measure(arm, running, replay, passes[row.prompt], row)

        every = [one for some in passes.values() for one in some]
        outcome = run_arm(
            arm,
            self.subject.model,
            lambda: self.subject.set_up(arm, replay, every, longest),
            measure,
        )
        return outcome.error

    def _passes(self, arm: Arm, prompt: int) -> list[Pass]:
        repeats = SLOW_REPEATS if arm.system == "accelerate" else self.settings.repeats
        texts = [
            self.subject.text.passages(self.settings.batch, prompt + 1, first=7 * index)
            for index in range(repeats + 1)
        ]
        return [Pass(text, prompt, 1) for text in texts]

    def _measure(
        self, arm: Arm, running: Running, replay: TextReplay | None, passes: list[Pass],
        row: PrefillRow,
    ) -> None:  # fmt: skip
        timings = Timings()
        workload = Workload(
            device=self.subject.device,
            prompt=row.prompt,
            replay=replay,
            options=running.options,
            counts=running.counts,
        )
        first, *timed = passes
        all_resident = arm.residency == FULL
        for one in passes if all_resident else [first]:  # to have every expert resident
            workload.warm_up(self.subject.model, one.passages, 1)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for one in timed:
            workload.run(self.subject.model, one.passages, timings)
        self._note(arm, row, timings)
        if arm.system == "expertflow":
            self._compare(row, workload.logits(self.subject.model, first.passages, 1))
            if all_resident and row.prompt == self.settings.profile:
                num_layers = len(self.subject.topology.stack().layers)
                profile(
                    partial(workload.warm_up, self.subject.model, first.passages, 1), num_layers
                )
        if running.stats is not None:
            self._record(running.stats, workload, timed, row)

    def _record(self, stats: Any, workload: Workload, passes: list[Pass], row: PrefillRow) -> None:
        """Record the last prompt after the first."""
        model, first, last = self.subject.model, passes[0], passes[-1]

        def generate(on_token: Callable[[], None]) -> None:
            workload.follow(model, last.passages, 1, on_token)

        def warm_up() -> None:
            workload.warm_up(model, first.passages, 1)

        try:
            lanes = record_prompt(warm_up, generate, stats, self.subject.device)
        except ValueError as error:
            row.not_recorded = str(error)
            return
        self.lanes[row.recording] = lanes.to_json()
        row.recorded_ms, row.busy_ms = lanes.us / 1e3, lanes.busy_ms()

    def _compare(self, row: PrefillRow, logits: torch.Tensor) -> None:
        known = self._logits.setdefault(row.prompt, logits)
        row.same_logits = None if known is logits else torch.equal(logits, known)

    def _note(self, arm: Arm, row: PrefillRow, timings: Timings) -> None:
        row.milliseconds = statistics.median(timings.first_token_s) * 1e3
        row.tokens_per_s = self.settings.batch * row.prompt / row.milliseconds * 1e3
        if torch.cuda.is_available():
            row.peak_bytes = torch.cuda.max_memory_allocated()
        if arm.system == "expertflow":
            if arm.residency == FULL:
                self._compute_ms[row.prompt] = row.milliseconds
            row.wasted_bytes = timings.prefill.bytes_wasted / len(timings.first_token_s)
            self._bound(row, timings.prefill.bytes_needed / len(timings.first_token_s))

    def _bound(self, row: PrefillRow, missing: float) -> None:
        bandwidth = self.subject.bandwidth
        row.missing_bytes = missing
        row.link_ms = None if bandwidth is None else missing / bandwidth * 1e3
        row.compute_ms = self._compute_ms.get(row.prompt)
        bounds = [bound for bound in (row.link_ms, row.compute_ms) if bound is not None]
        if bounds and row.milliseconds is not None:
            row.ratio = row.milliseconds / max(bounds)


def _measured(row: PrefillRow) -> Measured:
    return Measured(row.milliseconds, row.link_ms, row.prompt)
