"""Tables of the results of `python -m benchmarks.prefill`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import table
from benchmarks.common.report import number

FIGURES = {
    "ms": ("milliseconds", 1, ".1f"),
    "missed MB": ("missing_bytes", 1e6, ".0f"),
    "sent in vain, MB": ("wasted_bytes", 1e6, ".0f"),
    "ms of the link for what was missed": ("link_ms", 1, ".1f"),
}
"""Figures by column: the name in a row, the unit, the format."""
SAME = {None: "-", True: "identical", False: "differ"}


def prompts(document: dict[str, Any]) -> Iterator[str]:
    """Time to the first token of every arm and length that ran, beside the link's time."""
    return table(
        ("arm", "prompt", *FIGURES, "logits"),
        (
            (
                row["name"],
                str(row["prompt"]),
                *(number(row[key], spec, unit) for key, unit, spec in FIGURES.values()),
                SAME[row["same_logits"]],
            )
            for row in document["rows"]
            if row["error"] is None
        ),
    )
