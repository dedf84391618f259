"""Tables of the results of `python -m benchmarks.adaptation`, in Markdown.

python -m benchmarks.adaptation.page --results FILE
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common.markdown import Row, table
from routing.cli import run

Document = dict[str, Any]
NONE = "none"
"""The run without a correction."""


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """Print the tables of a JSON file of `python -m benchmarks.adaptation`."""

    results: Path
    """The JSON file."""


def main(settings: PageSettings) -> None:
    """Print all tables, those of the runs that the file has."""
    document = json.loads(settings.results.read_text(encoding="utf-8"))
    tables = [learnt(document), hit_rates(document), forgotten(document)]
    if "adapted_with_blend" in document:
        tables.append(blended(document))
    print("\n\n".join("\n".join(lines) for lines in tables))
    for value in document.get("online", {}):
        print("\n".join(["", f"{value}:", "", *online(document, value=value)]))


def learnt(document: Document) -> Iterator[str]:
    """Recall and calibration on the new text, before and after."""
    columns: Row = ("recall@K this", "next", "calibration error this", "next", "steps", "seconds")
    return table(("kind", "tokens", *columns), map(_learnt, document["results"]))


def hit_rates(document: Document) -> Iterator[str]:
    """Hit rates on the new text."""
    policies = ("lru", "lfu", "before", "after", "belady")
    columns = ("LRU", "LFU", "predicted, before", "after", "Belady")
    return table(
        ("kind", "tokens", *columns),
        ((*_name(one), *_rates(one, "new", policies)) for one in document["results"]),
    )


def forgotten(document: Document) -> Iterator[str]:
    """Recall and hit rates on the old text, before and after."""
    columns = ("old text: recall@K this", "next", "hit rates before", "after")
    replayed = [one for one in document["results"] if "old" in one["before"]]
    return table(("kind", "tokens", *columns), map(_kept, replayed))


def blended(document: Document) -> Iterator[str]:
    """Hit rates of the adapted files with the online blend; 0 tokens are the start."""
    results = document["adapted_with_blend"]
    rates = {(r["kind"], r["max_tokens"]): _joined(r["hit_rates"]) for r in results}
    tokens = sorted({number for _, number in rates})
    return table(
        ("kind", *(f"{number:,} tokens" for number in tokens)),
        (
            (kind, *(rates.get((kind, number), "") for number in tokens))
            for kind in dict.fromkeys(kind for kind, _ in rates)
        ),
    )


def online(document: Document, *, value: str) -> Iterator[str]:
    """Hit rates by label and correction, of one kind of predicted reuse."""
    results = document["online"][value]
    rates = {(r["label"], r["correction"]): _joined(r["hit_rates"]) for r in results}
    corrections = list(dict.fromkeys(correction for _, correction in rates))
    return table(
        ("kind", *corrections),
        (
            (label, *(rates[label, correction] for correction in corrections))
            for label in dict.fromkeys(label for label, _ in rates)
        ),
    )


def corrections(document: Document, kinds: Document, *, groups: str) -> Iterator[str]:
    """Mean change of the hit rates by each correction learnt online, in groups of kinds."""
    titles = kinds["groups"][groups]
    found = {
        (value, result["correction"], result["label"]): result["hit_rates"]
        for value, results in document["online"].items()
        for result in results
    }
    names = dict.fromkeys((value, name) for value, name, _ in found if name != NONE)
    return table(
        ("value", "correction", *(f"{title} ({len(own)})" for title, own in titles.items())),
        (
            (value, name, *(_mean_change(found, value, name, own) for own in titles.values()))
            for value, name in names
        ),
    )


def _mean_change(
    found: dict[tuple[str, str, str], list[float]], value: str, name: str, kinds: list[str]
) -> str:
    """The mean change of the hit rate at each cache size."""
    pairs = ((found[value, name, kind], found[value, NONE, kind]) for kind in kinds)
    changes = [[new - old for new, old in zip(*pair, strict=True)] for pair in pairs]
    return " / ".join(f"{fmean(of_size):+.3f}" for of_size in zip(*changes, strict=True))


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
