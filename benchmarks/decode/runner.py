"""Runner of the decode arms: warm up, compare logits, generate, fill in the row."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.decode.report import print_row
from benchmarks.decode.settings import DecodeSettings
from benchmarks.lanes.bound import Measured, set_bounds
from benchmarks.lanes.record import record_step
from benchmarks.replay.text_replay import TextReplay
from benchmarks.systems.arm import Arm
from benchmarks.systems.logits import compare_logits
from benchmarks.systems.row import Row
from benchmarks.systems.running import Running, run_arm
from benchmarks.systems.speed import fill_speed
from benchmarks.systems.subject import Pass, Subject
from benchmarks.systems.workload import Timings, Workload

WARM_UP_STEPS = 6
RECORDED_TOKENS = 16
SLOW = ("accelerate", "policylang")
SLOW_CHECK_STEPS = 2


class DecodeRunner:
    """Runs arms one after the other on one subject, within a time budget."""

    def __init__(self, settings: DecodeSettings, subject: Subject) -> None:
        self.settings, self.subject = settings, subject
        self.lanes: dict[str, dict[str, Any]] = {}
        """By arm, the lanes of one step as JSON."""
        self._start = time.perf_counter()
        self._references: dict[tuple[str, int], Tensor] = {}

    def run_all(self, arms: list[Arm], on_row: Callable[[list[Row]], None]) -> list[Row]:
        """A row for each arm. `on_row` gets all rows so far, with their bounds, after each arm."""
        rows: list[Row] = []
        for arm in arms:
            rows.append(self.run(arm))
            set_bounds(rows, _measured)
            on_row(rows)
        return rows

    def run(self, arm: Arm) -> Row:
        """The arm's row, printed at once."""
        if time.perf_counter() - self._start > self.settings.budget_seconds:
            row = Row(arm=arm, error="skipped: the time budget was spent")
        else:
            row = self._run(arm)
        print_row(row)
        return row

    def _run(self, arm: Arm) -> Row:
        context = self.settings.prompt + self.settings.tokens
        replay, passes = self.subject.replay(arm, context), self._passes(arm)
        return run_arm(
            arm,
            self.subject.model,
            lambda: self.subject.set_up(arm, replay, passes, context),
            lambda running, row: self._measure(arm, running, replay, passes, row),
        )

    def _passes(self, arm: Arm) -> list[Pass]:
        """The warm-up, the comparison of logits, and the timed passes."""
        settings, slow = self.settings, arm.system in SLOW
        prompt, tokens = settings.prompt, settings.tokens
        timed = 1 if slow or arm.batch > 1 or arm.system == "float32" else settings.documents
        check = SLOW_CHECK_STEPS if slow else min(settings.check_steps, tokens)
        texts = [
            self.subject.text.passages(arm.batch, prompt + tokens, first=arm.batch * index)
            for index in range(timed + 1)
        ]
        steps = 2 if slow else WARM_UP_STEPS
        if arm.system == "transformers":  # cuDNN plans its attention anew for every length
            steps = tokens
        warm_up = Pass(texts[0], prompt, min(steps, tokens))
        return [
            warm_up,
            warm_up._replace(new_tokens=check),
            *(Pass(text, prompt, tokens) for text in texts[1:]),
        ]

    def _measure(
        self, arm: Arm, running: Running, replay: TextReplay | None, passes: list[Pass],
        row: Row,
    ) -> None:  # fmt: skip
        settings, model, start = self.settings, self.subject.model, time.perf_counter()
        workload = Workload(
            device=self.subject.device,
            prompt=settings.prompt,
            replay=replay,
            options=running.options,
            counts=running.counts,
            max_seconds=settings.slow_seconds if arm.system in SLOW else settings.arm_seconds,
        )
        warm_up, check, *timed = passes
        row.note = None if arm.replays else "generates freely, which does not change its work"
        row.warm_up_s = workload.warm_up(model, warm_up.passages, warm_up.new_tokens)
        self._compare(arm, workload.logits(model, check.passages, check.new_tokens), row)
        running.reset()
        timings = Timings()
        for one in timed:
            if not timings.step_s or time.perf_counter() - start < settings.arm_seconds:
                workload.run(model, one.passages, timings)
        fill_speed(row, timings, self.subject.bandwidth)
        if running.stats is not None:
            self._record(running.stats, workload, timed[0], row)

    def _compare(self, arm: Arm, logits: Tensor, row: Row) -> None:
        """Compare with the first arm of this batch of the same system, transformers and float32."""
        if not arm.replays:
            return
        own = arm.system if arm.system in ("expertflow", "float32") else "transformers"
        for system in dict.fromkeys((own, "transformers", "float32")):
            reference = self._references.get((system, arm.batch))
            if reference is not None:
                steps = min(len(logits), len(reference))
                row.logits[system] = compare_logits(logits[:steps], reference[:steps])
        self._references.setdefault((own, arm.batch), logits)

    def _record(self, stats: Any, workload: Workload, one: Pass, row: Row) -> None:
        def generate(on_token: Callable[[], None]) -> None:
            tokens = min(RECORDED_TOKENS, one.new_tokens)
            workload.follow(self.subject.model, one.passages, tokens, on_token)

        try:
            lanes = record_step(generate, stats, self.subject.device, self.subject.bandwidth)
        except ValueError as error:
            row.not_recorded = str(error)
            return
        self.lanes[row.arm.name] = lanes.to_json()
        row.recorded_ms, row.busy_ms = lanes.us / 1e3, lanes.busy_ms()


def _measured(row: Row) -> Measured:
    return Measured(row.step_ms, row.floor_ms, (row.arm.compile, row.arm.batch))
