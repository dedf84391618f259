"""Tables of the results of `python -m benchmarks.adaptation`, in Markdown.

python -m benchmarks.adaptation.page --results FILE
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.cli import run

Row = Sequence[str]
Results = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """Print the tables of a JSON file of `python -m benchmarks.adaptation`."""

    results: Path
    """The JSON file."""


def main(settings: PageSettings) -> None:
    """Print all tables, those of the runs that the file has."""
    document = json.loads(settings.results.read_text(encoding="utf-8"))
    print("\n".join(page(document["results"])))
    if adapted := document.get("adapted_with_blend"):
        print("\n".join(["", *hits(adapted)]))
    for name, results in document.get("online", {}).items():
        print("\n".join(["", f"{name}:", "", *online(results)]))


def page(results: Results) -> Iterator[str]:
    """The lines of the tables: recall and calibration, hit rates, and what became of old text."""
    columns: Row = ("recall@K this", "next", "calibration error this", "next", "steps", "seconds")
    yield from table(("kind", "tokens", *columns), (_learnt(result) for result in results))
    yield ""
    policies = ("lru", "lfu", "before", "after", "belady")
    columns = ("LRU", "LFU", "predicted, before", "after", "Belady")
    yield from table(
        ("kind", "tokens", *columns),
        ((*_name(result), *_rates(result, "new", policies)) for result in results),
    )
    yield ""
    columns = ("old text: recall@K this", "next", "hit rates before", "after")
    replayed = [result for result in results if "old" in result["before"]]
    yield from table(("kind", "tokens", *columns), (_kept(result) for result in replayed))


def hits(results: Results) -> Iterator[str]:
    """The lines of a table of hit rates by kind and tokens; 0 tokens are the start."""
    rates = {(r["kind"], r["max_tokens"]): _joined(r["hit_rates"]) for r in results}
    tokens = sorted({number for _, number in rates})
    yield from table(
        ("kind", *(f"{number:,} tokens" for number in tokens)),
        (
            (kind, *(rates.get((kind, number), "") for number in tokens))
            for kind in dict.fromkeys(kind for kind, _ in rates)
        ),
    )


def online(results: Results) -> Iterator[str]:
    """The lines of a table of hit rates by label and correction."""
    rates = {(r["label"], r["correction"]): _joined(r["hit_rates"]) for r in results}
    corrections = list(dict.fromkeys(correction for _, correction in rates))
    yield from table(
        ("kind", *corrections),
        (
            (label, *(rates[label, correction] for correction in corrections))
            for label in dict.fromkeys(label for label, _ in rates)
        ),
    )


def table(head: Row, rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _name(result: dict[str, Any]) -> Row:
    return result["kind"], f"{result['tokens']['new']['train']:,}"


def _learnt(result: dict[str, Any]) -> Row:
    figures = (
        f"{head}_{metric}"
        for metric in ("recall", "calibration_error")
        for head in ("this", "next")
    )
    changes = (_change(result, "new", figure) for figure in figures)
    return *_name(result), *changes, str(result["best_step"]), f"{result['seconds']:.0f}"


def _kept(result: dict[str, Any]) -> Row:
    changes = (_change(result, "old", f"{head}_recall") for head in ("this", "next"))
    return *_name(result), *changes, *_rates(result, "old", ("before", "after"))


def _rates(result: dict[str, Any], part: str, policies: Sequence[str]) -> list[str]:
    return [_joined(result["hit_rates"][part][policy]) for policy in policies]


def _joined(rates: Sequence[float]) -> str:
    return " / ".join(f"{rate:.3f}" for rate in rates)


def _change(result: dict[str, Any], part: str, figure: str) -> str:
    before, after = (result[when][part][figure] for when in ("before", "after"))
    return f"{before:.3f} → {after:.3f}"


if __name__ == "__main__":
    run(
        main,
        PageSettings,
        prog="python -m benchmarks.adaptation.page",
        examples=["--results docs/results/2026-11-29-adaptation.json"],
    )
