"""Tables of the card of smol-moe: perplexity and routing by domain, and answers side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import table

Document = dict[str, Any]


def perplexity(document: Document) -> Iterator[str]:
    """Perplexity of every domain's held-out text, by the dense model and by the mixture."""
    trained = document["tokens"]
    return table(
        ("domain", "tokens trained on", "dense", "smol-moe", "change"),
        (
            (
                name,
                f"{trained[name]:,}" if name in trained else "none",
                f"{row['dense']:.2f}",
                f"{row['mixture']:.2f}",
                f"{row['mixture'] / row['dense'] - 1:+.1%}",
            )
            for name, row in document["held_out"]["perplexity"].items()
        ),
    )


def routing(document: Document) -> Iterator[str]:
    """Entropy of the experts' usage over its maximum, and the share of a layer's two most used."""
    usage = document["routing"]
    entropies = usage["entropy_by_domain"].items()
    return table(
        ("domain", "usage entropy", "uses of a layer's two most used experts"),
        (
            (name, f"{entropy:.3f}", f"{_two_most_used(usage['shares'][name]):.1%}")
            for name, entropy in entropies
        ),
    )


def _two_most_used(shares_LE: list[list[float]]) -> float:
    return sum(sum(sorted(layer)[-2:]) for layer in shares_LE) / len(shares_LE)


def answers(document: Document) -> Iterator[str]:
    """Questions, with the dense model's answer and the mixture's."""
    return table(
        ("question", "dense", "smol-moe"),
        (
            (_cell(row["question"]), _cell(row["dense"]), _answer(row))
            for row in document["answers"]
        ),
    )


def _answer(row: dict[str, str]) -> str:
    return "*the same*" if row["mixture"] == row["dense"] else _cell(row["mixture"])


def _cell(text: str) -> str:
    return " ⏎ ".join(text.replace("|", "\\|").split("\n"))
