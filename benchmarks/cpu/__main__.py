"""Experts on the CPU, one token at a time, in every encoding.

    python -m benchmarks.cpu
    python -m benchmarks.cpu --threads 1 2 --kinds plain mxfp4

doorbell   the C kernels in pinned threads of their own, from a ring to its answer
team       the same in torch's threads, as on a machine without a GPU, from call to return
core       the same in one thread, by its processor time: for machines that do other work too
torch      the generic path's two products and activation
reading    a sum over the same memory by torch

tokens/s is for the experts of all layers alone. The last line is JSON.
"""

from __future__ import annotations

import json

import torch

from benchmarks.common.machine import command, machine
from benchmarks.common.report import number, print_facts, print_table, save, settings_json
from benchmarks.cpu.bench import Timed, kernels
from benchmarks.cpu.settings import CpuSettings
from routing.cli import run
from runtime.cpu import usable_cores

COLUMNS = ("kind", "what", "threads", "at once", "ms an expert", "GB/s", "tokens/s")


def main(settings: CpuSettings) -> None:
    """Time all kinds; print a table, then all as JSON."""
    cores = usable_cores()
    facts = {
        "machine": machine(torch.device("cpu")) | {"cores": len(cores)},
        "command": command("benchmarks.cpu"),
        "settings": settings_json(settings),
    }
    print_facts(facts)
    rows: list[Timed] = []
    for kind in settings.kinds:
        rows += kernels(settings, kind, cores)
    of_token = settings.layers * settings.top_k
    print_table("Experts on the CPU", COLUMNS, [_cells(row, of_token) for row in rows], {})
    result = facts | {"rows": [row._asdict() for row in rows]}
    save(result, settings.out)
    print(json.dumps(result), flush=True)


def _cells(row: Timed, of_token: int) -> list[str]:
    """of_token: experts that a token uses."""
    return [
        row.kind, row.what, str(row.threads), str(row.at_once), number(row.seconds, ".4f", 1e-3),
        number(row.num_bytes / row.seconds, ".1f", 1e9), number(1 / row.seconds / of_token, ".1f"),
    ]  # fmt: skip


if __name__ == "__main__":
    run(main, CpuSettings, prog="python -m benchmarks.cpu")
