"""Tables of the results of `python -m benchmarks.decode`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import table
from benchmarks.common.report import number

Document = dict[str, Any]

FIGURES = {
    "tok/s": ("tokens_per_s", 1, ".1f"),
    "ms a step (median)": ("step_ms_median", 1, ".2f"),
    "GPU memory, GiB": ("peak_bytes", 2**30, ".2f"),
    "MB a token": ("bytes_per_token", 1e6, ".1f"),
}
"""Figures by column: the name in a row, the unit, the format."""


def arms(document: Document) -> Iterator[str]:
    """Speed, memory, hit rate, bytes and logits of every arm that ran."""
    rows = [row for row in document["rows"] if row["error"] is None]
    return table(
        ("arm", *FIGURES, "hit rate", "logits"),
        (
            (
                row["name"],
                *(number(row[key], spec, unit) for key, unit, spec in FIGURES.values()),
                number(row["hit_rate"], ".3f"),
                row["logits"].get(row["system"], "-"),
            )
            for row in rows
        ),
    )


def before_and_after(document: Document) -> Iterator[str]:
    """The same arms on two versions of the code, `before` and `after`."""
    pairs = zip(document["before"]["rows"], document["after"]["rows"], strict=True)
    return table(
        ("before / after", *FIGURES),
        (
            (
                after["name"],
                *(
                    " / ".join(number(row[key], spec, unit) for row in (before, after))
                    for key, unit, spec in FIGURES.values()
                ),
            )
            for before, after in pairs
        ),
    )
