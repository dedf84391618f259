"""The report of `python -m runtime.simulate --all`: tables, and a verdict on prefetching."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from routing.names import print_whole
from routing.shards import Document, TraceReader
from runtime.cache.belady import Belady
from runtime.simulation.comparison import (
    Contender,
    ContenderResult,
    decode_steps,
    other_replays,
    run_contender,
)
from runtime.simulation.contenders import all_contenders, decoded
from runtime.simulation.gap import best_free_rule, gap_closed
from runtime.simulation.link_model import Machine
from runtime.simulation.settings import SimulateSettings

COLUMNS = (
    "",
    "this",
    "next",
    "hits",
    "of LRU",
    "of free",
    "MB/token",
    "ms/token",
    "priced",
    "greedy",
    "useful MB",
    "wasted MB",
    "timely",
)
WORTH_IT = 0.005
"""The share of a token's time that prefetching has to save: it has costs that are not modelled."""


def compare(
    settings: SimulateSettings, reader: TraceReader, documents: Sequence[Document]
) -> tuple[list[ContenderResult], list[str]]:
    """Run all contenders and print a table for each cache size.

    Returns the results and the closing remarks. Raises ValueError for a trace or a predictor of
    another model.
    """
    shape = reader.stack.num_layers, reader.stack.num_experts
    sample = decoded(documents, shape[1])
    contenders = list(all_contenders(settings, reader, sample, shape))
    calls = [list(step.calls()) for step in decode_steps(sample.steps)]
    machine = Machine(expert_ms=settings.expert_mb / settings.link_gb_s, layer_ms=settings.layer_ms)
    results, remarks = [], []
    for share in settings.residency:
        rows = [run_contender(contender, calls, shape, share, machine) for contender in contenders]
        print_table(rows, other_replays(calls, shape, share), settings, share)
        remarks += [remark(row) for row in rows if row.saving is not None]
        results += rows
    print_recall_ahead(contenders)
    return results, remarks


def print_table(
    rows: Sequence[ContenderResult],
    others: Sequence[tuple[str, float]],
    settings: SimulateSettings,
    share: float,
) -> None:
    """Print the table of one cache size, a row for each contender.

    others: names and hit rates of replays by other rules.
    """
    from rich.table import Table

    machine = (
        f"{settings.expert_mb:g} MB an expert, {settings.link_gb_s:g} GB/s, "
        f"{settings.layer_ms:g} ms a layer"
    )
    table = Table(title=f"{share:.4g} of all experts resident; {machine}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    rates = {row.name: row.hit_rate for row in rows} | dict(others)
    best = best_free_rule(rates)
    for row in rows:
        table.add_row(*_cells(row, rates, best, settings.expert_mb))
    for name, hit_rate in others:
        table.add_row(name, "", "", f"{hit_rate:.3f}", *_gaps(hit_rate, rates, best))
    print_whole(table)
    if best is not None:
        print(f"gap to belady closed: of LRU's, and of that of the best free rule, {best}")


def _gaps(hit_rate: float, rates: Mapping[str, float], best: str | None) -> list[str]:
    """The share of the gap to Belady that is closed, of LRU's and of the best free rule's."""
    closed = [
        gap_closed(hit_rate, rates[floor], rates[Belady.name]) for floor in ("lru", best or "lru")
    ]
    return ["" if math.isnan(share) else f"{share:.0%}" for share in closed]


def _cells(
    row: ContenderResult, rates: Mapping[str, float], best: str | None, expert_mb: float
) -> list[str]:
    """One row of the table, in the order of `COLUMNS`. rates: the hit rates of all rows."""

    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    has_plan = row.saving is not None
    useful = row.timely + row.late
    return [
        row.name,
        number(row.recall_this),
        number(row.recall_next),
        number(row.hit_rate),
        *_gaps(row.hit_rate, rates, best),
        number(row.loads_per_token * expert_mb, 0),
        *(number(row.ms_per_token.get(plan), 2) for plan in ("none", "priced", "greedy")),
        number(useful * expert_mb if has_plan else None, 1),
        number(row.wasted * expert_mb if has_plan else None, 1),
        number(row.timely / useful if useful else None, 2),
    ]


def print_recall_ahead(contenders: Sequence[Contender]) -> None:
    """Print each contender's recall of the experts 1, 2 ... layers ahead, if any looks ahead."""
    from rich.table import Column, Table

    depth = max(len(contender.recall_ahead) for contender in contenders)
    rows = [contender for contender in contenders if depth and contender.recall_ahead]
    table = Table(Column("layers ahead", no_wrap=True))
    for distance in range(1, depth + 1):
        table.add_column(str(distance), justify="right")
    for row in rows:
        table.add_row(row.name, *(f"{value:.3f}" for value in row.recall_ahead))
    if rows:
        print("recall of the experts of a coming layer")
        print_whole(table)


def remark(row: ContenderResult) -> str:
    """The verdict on prefetching by the forecasts of one contender."""
    assert row.saving is not None
    verdict = "on" if row.saving >= WORTH_IT else "off"
    return (
        f"{row.name} at {row.residency:.4g}: prefetch {verdict}, the priced plan changes a token's "
        f"time by {-row.saving:+.1%}"
    )


def as_json(results: Sequence[ContenderResult]) -> list[dict[str, Any]]:
    """The results as plain data."""
    return [vars(row) | {"saving": row.saving} for row in results]
