"""The figures printed: a table for each cache size, and one of the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from routing.names import print_whole
from runtime.comparison.contenders import OPTIMUM
from runtime.comparison.figures import Figures, of_size
from runtime.simulation.gap import best_free_rule

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "recall@K", "recall@C", "hits", "gap, LRU", "gap, best free", "MB/token", "ms/token",
    "prefetching", "timely", "wasted MB",
)  # fmt: skip


def print_figures(figures: Sequence[Figures], detailed: Sequence[str]) -> None:
    """Print a table for each cache size, then the labels of each contender of `detailed`."""
    sizes = list(dict.fromkeys(row.residency for row in figures))
    for residency in sizes:
        print_whole(size_table(of_size(figures, residency), residency))
    if len({row.label for row in figures}) > 2:
        for name in detailed:
            for residency in sizes:
                print_whole(label_table(figures, residency, name))


def size_table(rows: Sequence[Figures], residency: float) -> Table:
    """A row for each contender."""
    from rich.table import Table

    title = f"{residency:.4g} of all experts resident, {rows[0].tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.contender, *_cells(row))
    return table


def _cells(row: Figures) -> list[str]:
    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return [
        number(row.recall_at_k),
        number(row.recall_at_c),
        number(row.hit_rate),
        percent(row.gap_lru),
        percent(row.gap_best),
        number(row.mb_per_token, 1),
        number(row.ms_per_token, 2),
        number(row.ms_priced, 2),
        percent(row.timely),
        number(row.wasted_mb, 1),
    ]


def label_table(figures: Sequence[Figures], residency: float, name: str) -> Table:
    """A row for each label, with the figures of the contender `name` and the bars beside them."""
    from rich.table import Table

    title = f"{name} by label, {residency:.4g} of all experts resident"
    table = Table(title=title, title_justify="left")
    for column in ("label", "tokens", "best free rule", "its hits", OPTIMUM, *COLUMNS):
        table.add_column(column, justify="left" if column == "label" else "right")
    for label in dict.fromkeys(row.label for row in figures if row.residency == residency):
        rows = {row.contender: row for row in of_size(figures, residency, label)}
        best = best_free_rule({one: row.hit_rate for one, row in rows.items()})
        table.add_row(
            label,
            f"{rows[name].tokens:,}",
            best,
            f"{rows[best].hit_rate:.3f}" if best else "",
            f"{rows[OPTIMUM].hit_rate:.3f}",
            *_cells(rows[name]),
        )
    return table
