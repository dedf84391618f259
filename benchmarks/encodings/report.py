"""Rows of the encodings' benchmark for people."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.report import number, print_table
from benchmarks.systems.row import Row

COLUMNS = (
    "arm", "resident", "tok/s", "ms/step", "hit rate", "MB/token", "link", "peak GiB", "in steps",
    "TTFT ms", "load s", "warm-up s", "logits",
)  # fmt: skip


def print_row(row: Row) -> None:
    """Print one row as a line, at once."""
    if row.error is not None:
        print(f"{row.arm.name}: {row.error}", flush=True)
        return
    cells = dict(zip(COLUMNS, _cells(row), strict=True))
    words = [f"{name} {text}" for name, text in cells.items() if text != "-" and name != "arm"]
    path = "".join(f", {text}" for text in (row.decode_path, row.note) if text)
    print(f"{row.arm.name}: {', '.join(words)}{path}", flush=True)


def print_rows(rows: Sequence[Row], title: str) -> None:
    """Print all rows as a table, then the errors of those that failed."""
    good = [_cells(row) for row in rows if row.error is None]
    failed = {row.arm.name: row.error for row in rows if row.error is not None}
    print_table(title, COLUMNS, good, failed)


def _cells(row: Row) -> list[str]:
    return [
        row.arm.name,
        number(row.extra.get("resident_share"), ".0%"),
        number(row.tokens_per_s, ".1f"),
        number(row.step_ms, ".2f"),
        number(row.hit_rate, ".3f"),
        number(row.bytes_per_token, ".1f", 1e6),
        number(row.link_efficiency, ".2f"),
        number(row.peak_bytes, ".2f", 2**30),
        number(row.extra.get("steps_bytes"), ".2f", 2**30),
        number(row.first_token_ms, ".1f"),
        number(row.load_s, ".1f"),
        number(row.warm_up_s, ".1f"),
        row.logits.get("expertflow", "-"),
    ]
