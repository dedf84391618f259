"""Tables of the throughput benchmark, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common.markdown import provenance, table

HEAD = (
    "arm", "resident", "tok/s", "prompt tok/s", "ms a full step", "with prompts", "GB a step",
    "of the link", "GPU memory, GiB",
)  # fmt: skip


def throughput(document: dict[str, Any]) -> Iterator[str]:
    """A run: its command and machine, and its arms."""
    yield from (*provenance(document), "")
    yield from by_arm(document["rows"])


def by_arm(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A row for each arm; arms that failed say why behind the table."""
    yield from table(HEAD, (_cells(row) for row in rows if "error" not in row))
    for row in rows:
        if "error" in row:
            yield from ("", f"{row['arm']}: {row['error']}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    name = row["arm"] if row["is_whole"] else f"{row['arm']} (ended by the clock)"
    return (
        name, f"{row['slots'] / row['experts']:.0%}", f"{row['tokens_per_s']:,.0f}",
        f"{row['prompt_tokens_per_s']:,.0f}", _ms(row["full_step_ms"]), _ms(row["mixed_step_ms"]),
        f"{row['bytes'] / row['steps'] / 1e9:.2f}", f"{row['of_link'] or 0:.2f}",
        f"{(row['peak_bytes'] or 0) / 2**30:.1f}",
    )  # fmt: skip


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
