"""The table of the benchmark of orderings, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.markdown import provenance, table

HEAD = (
    "sequences", "experts of a step", "arrival, MB a token", "predicted", "true routes",
    "twice as many at once", "as served", "saved, ms of the link a step", "ordering, ms a step",
    "as served, ms a step",
)  # fmt: skip


def ordering(document: dict[str, Any]) -> Iterator[str]:
    """A run: its command and machine, and a row for each number of sequences."""
    yield from (*provenance(document), "")
    yield from by_batch(document)


def by_batch(document: dict[str, Any]) -> Iterator[str]:
    """A row for each number of sequences."""
    found = {(row["batch"], row["order"]): row for row in document["rows"]}
    batches = list(dict.fromkeys(batch for batch, _ in found))
    return table(HEAD, (_cells(document, found, batch) for batch in batches))


def _cells(
    document: dict[str, Any], found: dict[tuple[int, str], dict[str, Any]], batch: int
) -> tuple[str, ...]:
    size, link = document["expert_bytes"], 1e9 * document["settings"]["link_gb_per_s"]
    arrival = found[batch, "arrival"]

    def cell(order: str) -> str:
        if (batch, order) not in found:
            return "-"
        loads = found[batch, order]["loads_per_token"]
        return f"{loads * size / 1e6:.1f} ({loads / arrival['loads_per_token'] - 1:+.1%})"

    def order_ms(order: str) -> str:
        return f"{found[batch, order]['order_ms']:.1f}" if (batch, order) in found else "-"

    predicted, saved_ms = found.get((batch, "predicted")), "-"
    if predicted is not None:
        saved = arrival["loads_per_token"] - predicted["loads_per_token"]
        tokens = predicted["tokens"] / predicted["steps"]
        saved_ms = f"{1e3 * saved * tokens * size / link:.1f}"
    share = arrival["used_share"]
    return (
        str(batch), "-" if share is None else f"{share:.0%}",
        f"{arrival['loads_per_token'] * size / 1e6:.1f}", cell("predicted"), cell("true"),
        cell("twice"), cell("served"), saved_ms, order_ms("predicted"), order_ms("served"),
    )  # fmt: skip
