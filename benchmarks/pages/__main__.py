"""The tables of all documents, made anew from the JSON files of docs/results.

python -m benchmarks.pages             # after new files: fill every table
python -m benchmarks.pages --check     # say which pages are out of date
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.pages.blocks import filled
from benchmarks.pages.tables import TABLES
from routing.cli import run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True, kw_only=True)
class PagesSettings:
    """Make the tables of the documents from the JSON files of docs/results."""

    pages: list[Path] = field(default_factory=list)
    """Documents to fill; README.md and all below docs and exports where none is named."""
    check: bool = False
    """Change nothing; exit with 1 where a page is out of date."""


def main(settings: PagesSettings) -> None:
    """Fill the pages, or name those that are out of date."""
    changed = outdated(settings.pages or documents())
    for page, text in changed.items():
        if settings.check:
            print(f"{page} is out of date: python -m benchmarks.pages")
        else:
            page.write_text(text, encoding="utf-8")
            print(f"{page}: filled")
    if settings.check and changed:
        raise SystemExit(1)


def documents() -> list[Path]:
    """Documents that may have tables made from results."""
    below = (sorted((ROOT / folder).rglob("*.md")) for folder in ("docs", "exports"))
    return [ROOT / "README.md", *(page for pages in below for page in pages)]


def outdated(pages: Sequence[Path]) -> dict[Path, str]:
    """The pages whose tables are not those that the files give, and their right text."""
    changed = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        try:
            new = filled(text, TABLES, RESULTS)
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
        if new != text:
            changed[page] = new
    return changed


if __name__ == "__main__":
    run(main, PagesSettings, prog="python -m benchmarks.pages", examples=["--check"])
