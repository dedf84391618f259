"""A table of the results of `python -m benchmarks.kernels --encodings`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import table

COLUMNS = (("gate_up", 1), ("down", 1), ("gate_up", 8), ("down", 8))
"""Kernels and tokens."""


def encodings(document: dict[str, Any]) -> Iterator[str]:
    """Microseconds of the experts' kernels: of the tiles in use then, and of the best if others."""
    rows = document["rows"]
    names = (f"{kernel}, {tokens} token{'s' * (tokens > 1)}" for kernel, tokens in COLUMNS)
    return table(
        ("shape, encoding", *names, "decode to bf16, GB/s"),
        (
            (
                f"{document['settings']['shape']}, {encoding}",
                *(_times(own, kernel, tokens) for kernel, tokens in COLUMNS),
                f"{max(r['num_bytes'] / r['seconds'] for r in _of(own, 'decode')) / 1e9:,.0f}",
            )
            for encoding in dict.fromkeys(row["encoding"] for row in rows)
            for own in [[row for row in rows if row["encoding"] == encoding]]
        ),
    )


def _of(rows: list[dict[str, Any]], kernel: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kernel"] == kernel]


def _times(rows: list[dict[str, Any]], kernel: str, tokens: int) -> str:
    timed = [row for row in _of(rows, kernel) if row["tokens"] == tokens]
    in_use = [row["seconds"] for row in timed if row["in_use"]]
    best = min(row["seconds"] for row in timed)
    return ", ".join(f"{seconds * 1e6:.1f}" for seconds in dict.fromkeys([*in_use, best]))


def attention(document: dict[str, Any]) -> Iterator[str]:
    """Microseconds of attention of one token a sequence: ours, the best tile tried, and torch's."""
    rows = document["rows"]
    return table(
        ("shape", "keys", "sequences", "tile in use then", "best tile", "torch", "torch, cuDNN"),
        (
            (
                document["settings"]["shape"],
                kernel.removeprefix("attend "),
                str(tokens),
                *_candidates([r for r in _of(rows, kernel) if r["tokens"] == tokens]),
            )
            for kernel, tokens in dict.fromkeys((row["kernel"], row["tokens"]) for row in rows)
        ),
    )


def _candidates(timed: list[dict[str, Any]]) -> Iterator[str]:
    tiles = [row for row in timed if not row["candidate"].startswith("torch")]
    in_use = next(row for row in tiles if row["in_use"])
    for tile in (in_use, min(tiles, key=lambda row: row["seconds"])):
        yield f"{tile['candidate']}: {tile['seconds'] * 1e6:.1f}"
    for name in ("torch", "torch, cuDNN"):
        yield next(f"{row['seconds'] * 1e6:.1f}" for row in timed if row["candidate"] == name)
