"""Tables of the serving benchmarks, each arm beside `fifo` at the same residency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.serving.load import ServingLoad


def print_cpu_table(settings: ServingLoad, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of `benchmarks.serving`."""
    from rich.console import Console
    from rich.table import Table

    arrivals = f"{settings.rate} a second" if settings.rate else "all at once"
    table = Table(
        title=f"{settings.requests} requests, {arrivals}, batch {settings.batch}",
        title_justify="left",
    )
    heads = "resident arm KiB/token vs tok/CPU-s vs tok/s vs p50 p99 vs first-p99"
    for head in f"{heads} scheduler predictor loads KV-MiB forecast-MiB rested tokens".split():
        table.add_column(head, justify="right")
    for row in rows:
        base = _base(rows, row)
        table.add_row(
            f"{row['residency']:.1%}",
            row["arm"],
            f"{row['bytes_per_token'] / 1024:.0f}",
            f"{row['bytes_per_token'] / base['bytes_per_token'] - 1:+.1%}",
            f"{row['tokens_per_busy_second']:.1f}",
            f"{row['tokens_per_busy_second'] / base['tokens_per_busy_second'] - 1:+.1%}",
            f"{row['tokens_per_wall_second']:.1f}",
            f"{row['tokens_per_wall_second'] / base['tokens_per_wall_second'] - 1:+.1%}",
            f"{row['p50']:.1f} s",
            f"{row['p99']:.1f} s",
            f"{row['p99'] / base['p99']:.2f}x",
            f"{row['first_token_p99']:.1f} s",
            f"{row['scheduler_share']:.2%}",
            f"{row['predictor_share']:.1%}",
            f"{row['load_share']:.1%}",
            f"{row['key_value_bytes'] / 2**20:.1f}",
            f"{row['forecast_bytes'] / 2**20:.1f}",
            str(row["rested"]),
            "identical" if row["identical"] else "DIFFERENT",
        )
    Console(width=230).print(table)


def _base(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """The row of `fifo` at the same residency if it ran, else the first there."""
    same = [other for other in rows if other["residency"] == row["residency"]]
    return next((other for other in same if other["arm"] == "fifo"), same[0])


def print_gpu_table(shape: str, settings: ServingLoad, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of `benchmarks.serving.gpu`. shape: the model's."""
    from rich.console import Console
    from rich.table import Table

    arrivals = f"{settings.rate:g} a second" if settings.rate else "all at once"
    title = f"{shape}, {settings.requests} requests, {arrivals}, batch {settings.batch}"
    table = Table(title=title, title_justify="left")
    heads = "resident arm MB/token vs tok/s vs p50 p99 vs hits recall link scheduler rested GiB"
    for head in heads.split():
        table.add_column(head, justify="right")
    for row in rows:
        base = _base(rows, row)
        table.add_row(
            f"{row['resident']:.1%}",
            row["arm"],
            f"{row['bytes_per_token'] / 1e6:.1f}",
            f"{row['bytes_per_token'] / base['bytes_per_token'] - 1:+.1%}",
            f"{row['tokens_per_wall_second']:.1f}",
            f"{row['tokens_per_wall_second'] / base['tokens_per_wall_second'] - 1:+.1%}",
            f"{row['p50']:.1f} s",
            f"{row['p99']:.1f} s",
            f"{row['p99'] / base['p99']:.2f}x",
            f"{row['hit_rate']:.1%}",
            f"{row['recall']:.1%}",
            f"{row['link']:.2f}",
            f"{row['scheduler_share']:.2%}",
            str(row["rested"]),
            f"{row['peak_bytes'] / 2**30:.2f}",
        )
    Console(width=180).print(table)
