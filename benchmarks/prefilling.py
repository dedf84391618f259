"""One arm of benchmarks.prefill at every prompt length, and its rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.arms import Arm, ArmRow, Row, Running, run_arm
from benchmarks.plan import FULL
from benchmarks.replay import Replay
from benchmarks.report import number, print_table
from benchmarks.subject import Pass, Subject
from benchmarks.workload import Timings, Workload

if TYPE_CHECKING:
    from benchmarks.prefill import PrefillSettings

COLUMNS = (
    "arm", "prompt", "ms", "tok/s", "peak GiB", "missed MB", "wasted MB", "link ms",
    "compute ms", "ratio",
)  # fmt: skip
SLOW_REPEATS = 2


@dataclass(kw_only=True)
class PrefillRow(ArmRow):
    """One arm at one prompt length; None is what does not apply."""

    prompt: int
    milliseconds: float | None = None
    """Median over the prompts, from the call of generate to the logits of the last token."""
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    missing_bytes: float | None = None
    """Mean over the prompts: bytes of experts that had to come."""
    wasted_bytes: float | None = None
    """Mean over the prompts: bytes of experts that came ahead and were not needed."""
    link_ms: float | None = None
    """Missing bytes / measured bandwidth."""
    compute_ms: float | None = None
    """The same prompts with every expert resident."""
    ratio: float | None = None
    """Time / the larger of the two."""


class Prefilling:
    """Runs arms one after the other on one subject, until the time is up."""

    def __init__(self, settings: PrefillSettings, subject: Subject) -> None:
        self.settings, self.subject = settings, subject
        self._start = time.perf_counter()
        self._compute_ms: dict[int, float] = {}

    def run(self, arm: Arm) -> list[PrefillRow]:
        """A row for each prompt length, printed when the arm has ended."""
        rows = [PrefillRow(arm=arm, prompt=prompt) for prompt in self.settings.prompts]
        error = self._fill(arm, rows)
        for row in rows:
            row.error = error
            cells = dict(zip(COLUMNS, _cells(row), strict=True))
            print(", ".join(f"{k} {v}" for k, v in cells.items() if v != "-"), row.error or "",
                  flush=True)  # fmt: skip
        return rows

    def _fill(self, arm: Arm, rows: list[PrefillRow]) -> str | None:
        """Measure all lengths of one arm; returns what went wrong."""
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
        self, arm: Arm, running: Running, replay: Replay | None, passes: list[Pass],
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
        for one in passes if all_resident else [first]:  # then nothing is missing any more
            workload.warm_up(self.subject.model, one.passages, 1)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for one in timed:
            workload.run(self.subject.model, one.passages, timings)
        self._note(arm, row, timings)

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


def print_rows(rows: Sequence[PrefillRow], title: str) -> None:
    """All rows as a table, then what failed."""
    good = [_cells(row) for row in rows if row.error is None]
    failed = {f"{r.arm.name}, prompt {r.prompt}": r.error for r in rows if r.error is not None}
    print_table(title, COLUMNS, good, failed)


def _cells(row: PrefillRow) -> list[str]:
    return [
        row.arm.name,
        str(row.prompt),
        number(row.milliseconds, ".1f"),
        number(row.tokens_per_s, ".0f"),
        number(row.peak_bytes, ".2f", 2**30),
        number(row.missing_bytes, ".0f", 1e6),
        number(row.wasted_bytes, ".0f", 1e6),
        number(row.link_ms, ".1f"),
        number(row.compute_ms, ".1f"),
        number(row.ratio, ".2f"),
    ]
