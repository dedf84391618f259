"""Table and JSON of the loading benchmark."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from benchmarks.loading.arms import PROMPT
from benchmarks.loading.settings import LoadingSettings


def report(
    settings: LoadingSettings, facts: dict[str, Any], results: dict[str, dict[str, float]]
) -> None:
    """Print the tables, then all results as one line of JSON."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from benchmarks.common.machine import command, machine

    table = Table(
        "arm", "load s", f"{PROMPT}-token prompt s", "peak MiB, loading", "peak MiB", "held MiB"
    )
    reads = Table("arm", "seconds", "GB/s")
    for name, values in results.items():
        if "read_s" in values:
            speed = facts["expert_bytes"] / values["read_s"] / 1e9
            reads.add_row(name, f"{values['read_s']:.2f}", f"{speed:.2f}")
            continue
        sizes = [values[key] / 2**20 for key in ("load_peak_bytes", "peak_bytes", "held_bytes")]
        seconds = f"{values['load_s']:.2f}", f"{values['prompt_s']:.2f}"
        table.add_row(name, *seconds, *(f"{size:,.0f}" for size in sizes))
    where = machine(torch.device("cpu"))
    console = Console(highlight=False, soft_wrap=True)
    run_by = command("benchmarks.loading")
    console.print(run_by, where)
    console.print(table, reads)
    console.print({key: round(value, 2) for key, value in facts.items()})
    record = {"settings": asdict(settings), "machine": where, "command": run_by}
    print(json.dumps(record | facts | {"arms": results}))
