"""Rows of a benchmark, for people: one line as each comes, and a table at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.arms import Row

COLUMNS = (
    "arm", "TTFT ms", "tok/s", "ms/step", "median", "peak GiB", "hit rate", "MB/token", "wasted",
    "link", "delivered", "recall", "predict ms", "logits", "vs float32",
)  # fmt: skip


def print_facts(facts: Mapping[str, Any]) -> None:
    """What the rows depend on."""
    for name, value in facts.items():
        print(f"{name}: {value}", flush=True)


def save(result: Mapping[str, Any], out: Path | None) -> None:
    """As JSON into the file `out`, where one is named."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result) + "\n")


def settings_json(settings: Any) -> dict[str, Any]:
    """The settings, for JSON."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}


def require_matplotlib(plots: Path | None) -> None:
    """Raise ValueError, before hours are spent, when pictures are asked for and cannot be drawn."""
    if plots is not None and find_spec("matplotlib") is None:
        raise ValueError(
            "--plots needs matplotlib; leave it out, and draw from the file of --out later with "
            "python -m benchmarks.draw"
        )


def print_row(row: Row) -> None:
    """One line, at once."""
    if row.error is not None:
        print(f"{row.arm.name}: {row.error} ({row.total_s or 0:.1f} s)", flush=True)
        return
    cells = dict(zip(COLUMNS, _cells(row), strict=True))
    words = [f"{name} {text}" for name, text in cells.items() if text != "-" and name != "arm"]
    path = "".join(f", {text}" for text in (row.decode_path, row.note) if text)
    times = f"load {row.load_s:.1f} s, warm-up {row.warm_up_s:.1f} s, in all {row.total_s:.1f} s"
    print(f"{row.arm.name}: {', '.join(words)}{path} ({times})", flush=True)


def print_rows(rows: Sequence[Row], title: str) -> None:
    """All rows as a table, then what failed."""
    good = [_cells(row) for row in rows if row.error is None]
    failed = {row.arm.name: row.error for row in rows if row.error is not None}
    print_table(title, COLUMNS, good, failed)


def print_table(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], failed: Mapping[str, str]
) -> None:
    """A table, the first column left; below it what failed, and why."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in cells:
        table.add_row(*row)
    console = Console(width=170)
    console.print(table)
    for name, error in failed.items():
        console.print(f"{name}: {error}", markup=False)


def ratios(rows: Sequence[Row], policy: str, residency: str) -> dict[str, float]:
    """Decode speed of the arm named so, over every rival's, and of its batches over its own."""
    speeds = {row.arm: row.tokens_per_s for row in rows if row.tokens_per_s}
    ours = {
        arm.batch: speed
        for arm, speed in speeds.items()
        if (arm.policy, arm.residency, arm.prefetch, arm.compile)
        == (policy, residency, False, False)
    }
    if 1 not in ours:
        return {}
    rivals = {arm.name: ours[1] / s for arm, s in speeds.items() if arm.system != "expertflow"}
    batches = {f"batch {b} over batch 1": s / ours[1] for b, s in ours.items() if b > 1}
    return {f"over {name}": ratio for name, ratio in rivals.items()} | batches


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


def number(value: float | None, spec: str, unit: float = 1) -> str:
    """The value in `unit`s, or a dash where there is none."""
    return "-" if value is None else format(value / unit, spec)
