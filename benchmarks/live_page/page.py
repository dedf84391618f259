"""The tables of the benchmark of the open page, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import provenance, table

Row = dict[str, Any]
HEAD = (
    "viewer", "tokens/s, median", "least and most", "beside nobody, median of pairs",
    "tokens a CPU second of the server",
    "browser, ms of CPU a second", "HTTP thread, ms", "more than for nobody, both",
    "of all cores",
)  # fmt: skip


def live_page(document: dict[str, Any]) -> Iterator[str]:
    """A run: its command and machine, and a row for each viewer."""
    yield from (*provenance(document), "")
    yield from by_viewer(document)


def by_viewer(document: dict[str, Any]) -> Iterator[str]:
    """A row for each viewer, in the order of the turns."""
    found: dict[str, list[Row]] = {}
    for row in document["rows"]:
        found.setdefault(row["viewer"], []).append(row)
    return table(HEAD, (_cells(found, viewer, document["cores"]) for viewer in found))


def _cells(found: dict[str, list[Row]], viewer: str, cores: int) -> tuple[str, ...]:
    rows, alone = found[viewer], found.get("nobody", [])
    speeds = [row["tokens_per_second"] for row in rows]
    pairs = [
        row["tokens_per_second"] / other["tokens_per_second"] - 1
        for row, other in zip(rows, alone, strict=False)
    ]
    browser = 1e3 * statistics.median(sum(row["browser"].values()) for row in rows)
    http = 1e3 * statistics.median(row["http"] for row in rows)
    more = browser + http - 1e3 * statistics.median([row["http"] for row in alone] or [0.0])
    return (
        viewer, f"{statistics.median(speeds):.1f}", f"{min(speeds):.1f} to {max(speeds):.1f}",
        f"{statistics.median(pairs):+.1%}" if pairs and viewer != "nobody" else "-",
        f"{statistics.median(row['tokens_per_second'] / row['server'] for row in rows):.1f}",
        f"{browser:.1f}", f"{http:.1f}", f"{more:.1f}", f"{more / 1e3 / cores:.1%}",
    )  # fmt: skip
