"""Prefill rows for people: a line as each comes, and a table at the end."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.report import number, print_table
from benchmarks.prefill.row import PrefillRow

COLUMNS = (
    "arm", "prompt", "ms", "tok/s", "peak GiB", "missed MB", "wasted MB", "link ms",
    "compute ms", "ratio", "same bits",
)  # fmt: skip


def print_row(row: PrefillRow) -> None:
    """Print one row as a line, at once."""
    cells = dict(zip(COLUMNS, _cells(row), strict=True))
    words = ", ".join(f"{name} {text}" for name, text in cells.items() if text != "-")
    print(words, row.error or "", flush=True)


def print_rows(rows: Sequence[PrefillRow], title: str) -> None:
    """Print all rows as a table, then the errors of those that failed."""
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
        "-" if row.same_logits is None else "yes" if row.same_logits else "NO",
    ]
