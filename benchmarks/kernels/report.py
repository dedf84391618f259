"""Rows of the kernels benchmark, and their table."""

from __future__ import annotations

from typing import NamedTuple


class TimedKernel(NamedTuple):
    """One kernel under one candidate tile."""

    kernel: str
    tokens: int
    candidate: str
    in_use: bool
    seconds: float
    num_bytes: float
    """Bytes of the weights it reads, each used expert once."""
    operations: float


def print_kernels(rows: list[TimedKernel], title: str) -> None:
    """Print, for every kernel and number of tokens, the candidate in use and the best."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for head in ("kernel", "tokens", "in use", "us", "GB/s", "TFLOP/s", "best", "us", "saves"):
        table.add_column(head, justify="left" if head in ("in use", "best") else "right")
    for kernel, tokens in dict.fromkeys((row.kernel, row.tokens) for row in rows):
        same = [row for row in rows if (row.kernel, row.tokens) == (kernel, tokens)]
        used = next(row for row in same if row.in_use)
        best = min(same, key=lambda row: row.seconds)
        table.add_row(
            kernel,
            str(tokens),
            used.candidate,
            f"{1e6 * used.seconds:.1f}",
            f"{used.num_bytes / used.seconds / 1e9:.0f}",
            f"{used.operations / used.seconds / 1e12:.1f}",
            best.candidate,
            f"{1e6 * best.seconds:.1f}",
            f"{1 - best.seconds / used.seconds:.0%}",
        )
    Console(width=170).print(table)
