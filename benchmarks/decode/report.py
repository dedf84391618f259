"""Decode rows for people: a line as each comes, a table at the end, and speed ratios."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.report import number, print_table
from benchmarks.systems.row import Row

COLUMNS = (
    "arm", "TTFT ms", "tok/s", "ms/step", "median", "peak GiB", "hit rate", "MB/token", "wasted",
    "link", "delivered", "recall", "predict ms", "logits", "vs float32",
)  # fmt: skip


def print_row(row: Row) -> None:
    """Print one row as a line, at once."""
    if row.error is not None:
        print(f"{row.arm.name}: {row.error} ({row.total_s or 0:.1f} s)", flush=True)
        return
    cells = dict(zip(COLUMNS, _cells(row), strict=True))
    words = [f"{name} {text}" for name, text in cells.items() if text != "-" and name != "arm"]
    path = "".join(f", {text}" for text in (row.decode_path, row.note) if text)
    times = f"load {row.load_s:.1f} s, warm-up {row.warm_up_s:.1f} s, in all {row.total_s:.1f} s"
    print(f"{row.arm.name}: {', '.join(words)}{path} ({times})", flush=True)


def print_rows(rows: Sequence[Row], title: str) -> None:
    """Print all rows as a table, then the errors of those that failed."""
    good = [_cells(row) for row in rows if row.error is None]
    failed = {row.arm.name: row.error for row in rows if row.error is not None}
    print_table(title, COLUMNS, good, failed)


def ratios(rows: Sequence[Row], policy: str, residency: str) -> dict[str, float]:
    """Decode speed of ExpertFlow's arm over every other system's, and of its batches over batch 1.

    policy, residency: of that arm, without prefetching and compilation. Empty if it did not run.
    """
    speeds = {row.arm: row.tokens_per_s for row in rows if row.tokens_per_s}
    of_batch = {
        arm.batch: speed
        for arm, speed in speeds.items()
        if (arm.policy, arm.residency, arm.prefetch, arm.compile)
        == (policy, residency, False, False)
    }
    if 1 not in of_batch:
        return {}
    single = of_batch[1]
    systems = {
        f"over {arm.name}": single / speed
        for arm, speed in speeds.items()
        if arm.system != "expertflow"
    }
    batches = {f"batch {b} over batch 1": s / single for b, s in of_batch.items() if b > 1}
    return systems | batches


def _cells(row: Row) -> list[str]:
    return [
        row.arm.name,
        number(row.first_token_ms, ".1f"),
        number(row.tokens_per_s, ".1f"),
        number(row.step_ms, ".2f"),
        number(row.step_ms_median, ".2f"),
        number(row.peak_bytes, ".2f", 2**30),
        number(row.hit_rate, ".3f"),
        number(row.bytes_per_token, ".1f", 1e6),
        number(row.wasted_per_token, ".1f", 1e6),
        number(row.link_efficiency, ".2f"),
        number(row.delivered, ".2f"),
        number(row.recall, ".3f"),
        number(row.prediction_ms, ".2f"),
        row.logits.get(row.arm.system, "-"),
        row.logits.get("float32", "-").partition(",")[0],
    ]
