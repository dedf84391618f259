"""Tables of the results of `python -m benchmarks.adaptation`, in Markdown.

python -m benchmarks.adaptation.page --results FILE
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.cli import run

Row = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """Print the tables of a JSON file of `python -m benchmarks.adaptation`."""

    results: Path
    """The JSON file."""


def main(settings: PageSettings) -> None:
    """Print all tables."""
    results = json.loads(settings.results.read_text(encoding="utf-8"))["results"]
    print("\n".join(page(results)))


def page(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of the tables: recall and calibration, hit rates, and what became of old text."""
    yield from table(
        ("kind", "tokens", "recall@K this", "next", "calibration error this", "next", "CPU steps"),
        (
            (
                result["kind"],
                f"{result['tokens']['new']['train']:,}",
                *(
                    _change(result, "new", f"{head}_{metric}")
                    for metric in ("recall", "calibration_error")
                    for head in ("this", "next")
                ),
                str(result["best_step"]),
            )
            for result in results
        ),
    )
    yield ""
    yield from table(
        ("kind", "tokens", "LRU", "LFU", "before", "after", "Belady"),
        (
            (
                result["kind"],
                f"{result['tokens']['new']['train']:,}",
                *(
                    " / ".join(f"{rate:.3f}" for rate in result["hit_rates"]["new"][policy])
                    for policy in ("lru", "lfu", "before", "after", "belady")
                ),
            )
            for result in results
        ),
    )
    yield ""
    replayed = [result for result in results if "old" in result["before"]]
    yield from table(
        ("kind", "tokens", "old text: recall@K this", "next", "hit rates before", "after"),
        (
            (
                result["kind"],
                f"{result['tokens']['new']['train']:,}",
                *(_change(result, "old", f"{head}_recall") for head in ("this", "next")),
                *(
                    " / ".join(f"{rate:.3f}" for rate in result["hit_rates"]["old"][policy])
                    for policy in ("before", "after")
                ),
            )
            for result in replayed
        ),
    )


def table(head: Row, rows: Iterator[Row]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _change(result: dict[str, Any], part: str, figure: str) -> str:
    before, after = (result[when][part][figure] for when in ("before", "after"))
    return f"{before:.3f} → {after:.3f}"


if __name__ == "__main__":
    run(
        main,
        PageSettings,
        prog="python -m benchmarks.adaptation.page",
        examples=["--results x.json"],
    )
