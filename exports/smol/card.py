"""Tables of smol-moe's card, written from its records.

    python -m exports.smol.card --folder exports/smol-moe

In FOLDER/README.md the text between `<!-- table: NAME -->` and `<!-- end -->` is replaced; the
names are `perplexity` and `routing` (from training.json) and `answers` (from answers.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exports.smol.answers import answer_table
from routing.cli import run

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """Write the tables of smol-moe's card from its records."""

    folder: Path = Path("exports/smol-moe")
    """Folder of README.md, training.json and answers.json."""


def main(settings: CardSettings) -> None:
    """Rewrite the card's tables."""
    card = settings.folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(with_tables(text, settings.folder), encoding="utf-8")


def with_tables(text: str, folder: Path) -> str:
    """A card with its tables as the records in `folder` have them. Raises ValueError."""

    def table(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}: there are {', '.join(TABLES)}")
        record, write = TABLES[name]
        path = folder / record
        if not path.is_file():
            raise ValueError(f"{path} not found, which the table {name} is made of")
        return f"{found[1]}{write(json.loads(path.read_text(encoding='utf-8')))}{found[3]}"

    return BLOCK.sub(table, text)


def perplexity_table(record: dict[str, Any]) -> str:
    """Perplexity of every domain, by the dense model and by the mixture."""
    lines = ["| domain | tokens trained on | dense | smol-moe | change |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, row in record["held_out"]["perplexity"].items():
        trained = record["tokens"].get(name)
        change = row["mixture"] / row["dense"] - 1
        lines.append(
            f"| {name} | {'none' if trained is None else f'{trained:,}'} | {row['dense']:.2f} | "
            f"{row['mixture']:.2f} | {change:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def routing_table(record: dict[str, Any]) -> str:
    """Entropy of the experts' usage by domain, and the share of its two most used experts."""
    usage = record["routing"]
    lines = [
        "| domain | usage entropy | share of the two most used experts |",
        "| --- | ---: | ---: |",
    ]
    for name, entropy in usage["entropy_by_domain"].items():
        tops = [sum(sorted(layer)[-2:]) for layer in usage["shares"][name]]
        lines.append(f"| {name} | {entropy:.3f} | {sum(tops) / len(tops):.1%} |")
    lines.append(f"| **all** | {usage['entropy']:.3f} | |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "perplexity": ("training.json", perplexity_table),
    "routing": ("training.json", routing_table),
    "answers": ("answers.json", answer_table),
}


if __name__ == "__main__":
    run(main, CardSettings, prog="python -m exports.smol.card", examples=[""])
