"""A results page out of the encodings' JSON files, as Markdown.

python -m benchmarks.encodings.page --results FILE [FILE ...] [--out PAGE]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import provenance, table
from benchmarks.common.report import number
from benchmarks.systems.arm import ONE_GUESS
from routing.cli import run

LLAMA_CPP = (
    ("bf16", "all, 13.8 GB file", 595.0),
    ("Q4_K", "all, 3.9 GB file", 800.0),
    ("Q4_K", "a quarter", 141.0),
    ("Q4_0", "all", 859.0),
    ("Q4_0", "a quarter", 120.0),
)
"""Decoding speeds of llama.cpp on the same shape and kind of machine, measured on 2026-11-28."""
LLAMA_SHAPE = "olmoe-7b"
SOURCE = (
    "llama.cpp (llama-cpp-python 0.3.36) was measured on 2026-11-28 on another machine of the same "
    "kind ([2026-11-28](2026-11-28-gpu-h200.md)), and not again for this page."
)
HEAD = (
    "encoding", "memory asked", "GPU memory, GiB", "in steps", "resident", "arm", "tok/s",
    "hit rate", "MB a token", "link", "logits",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """Write the page."""

    results: list[Path]
    """Files that `benchmarks.encodings --out` wrote."""
    out: Path | None = None
    """The page; by default it is printed."""


def main(settings: PageSettings) -> None:
    """Write the page, or print it."""
    text = page([json.loads(path.read_text()) for path in settings.results])
    if settings.out is None:
        print(text)
    else:
        settings.out.write_text(text)


def page(results: Sequence[dict[str, Any]]) -> str:
    """Each run with its command and machine, and a table for each of its shapes."""
    lines = ["# Encodings at equal GPU memory", ""]
    for one in results:
        lines += [*measured(one), ""]
    rows = [row for one in results for row in one["rows"]]
    if any(row["shape"] == LLAMA_SHAPE for row in rows):
        lines += [*llama_cpp(), ""]
    failed = [f"- {row['name']}: {row['error']}" for row in rows if row["error"] is not None]
    return "\n".join([*lines, *(["## Not run", "", *failed] if failed else [])]).rstrip() + "\n"


def measured(one: dict[str, Any]) -> list[str]:
    """A run: its command and machine, and a table for each of its shapes."""
    lines = provenance(one)
    for shape in dict.fromkeys(row["shape"] for row in one["rows"]):
        own = [row for row in one["rows"] if row["shape"] == shape and row["error"] is None]
        if own:
            lines += ["", f"{shape}; {_routes(own)}", "", *table(HEAD, map(_cells, own))]
    return lines


def llama_cpp() -> list[str]:
    """The speeds of llama.cpp, and where they are from."""
    others = [(name, share, f"{speed:g}") for name, share, speed in LLAMA_CPP]
    head = f"{LLAMA_SHAPE} in llama.cpp", "on the GPU", "tok/s"
    return [*table(head, others), "", SOURCE]


def _routes(rows: Iterable[dict[str, Any]]) -> str:
    """The routes behind each name, where they are drawn or replayed."""
    notes = {row["routes"]: row["note"] for row in rows}
    return f"routes: {'; '.join(f'{name}: {note}' for name, note in notes.items())}."


def _cells(row: dict[str, Any]) -> Sequence[str]:
    ahead = "one guess a layer" if row["prefetch"] == ONE_GUESS else "prefetch"
    words = [row["policy"], ahead if row["prefetch"] else "", row["routes"]]
    words.append("`compile`" if row["compile"] else "")
    words.append("" if row.get("is_captured", True) else "uncaptured")
    words.append("the CPU's share" if row.get("cpu_share") else "")
    return (
        row["encoding"],
        row["residency"],
        number(row["peak_bytes"], ".2f", 2**30),
        number(row["extra"].get("steps_bytes"), ".2f", 2**30),
        number(row["extra"].get("resident_share"), ".0%"),
        ", ".join(filter(None, words)),
        number(row["tokens_per_s"], ".1f"),
        number(row["hit_rate"], ".3f"),
        number(row["bytes_per_token"], ".1f", 1e6),
        number(row["link_efficiency"], ".2f"),
        row["logits"].get(row["system"], "-"),
    )


if __name__ == "__main__":
    run(main, PageSettings, prog="python -m benchmarks.encodings.page")
