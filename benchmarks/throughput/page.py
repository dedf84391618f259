"""Tables of the throughput benchmark, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common.markdown import provenance, table
from benchmarks.common.report import number
from benchmarks.throughput.arm import batch_of

HEAD = (
    "arm", "sequences", "resident", "tok/s", "prompt tok/s", "ms a full step", "with prompts",
    "GB a step", "of the link", "of the bound", "GPU memory, GiB",
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
    crossed = row["bytes"] + row.get("bytes_spilled", 0) if "bytes" in row else None
    gigabytes = None if crossed is None else crossed / row["steps"] / 1e9
    bound = "-" if row.get("of_bound") is None else f"{row['of_bound']:.2f} ({row['bound']})"
    return (
        name, str(batch_of(row)),
        f"{row['slots'] / row['experts']:.0%}", f"{row['tokens_per_s']:,.0f}",
        f"{row['prompt_tokens_per_s']:,.0f}", number(row.get("full_step_ms"), ".1f"),
        number(row.get("mixed_step_ms"), ".1f"), number(gigabytes, ".2f"),
        number(row.get("of_link"), ".2f"), bound, number(row["peak_bytes"], ".1f", 2**30),
    )  # fmt: skip
