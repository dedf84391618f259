"""Which tile sizes suit a GPU: the experts' kernels under several, without a link.

    python -m benchmarks.tiles --shape olmoe-7b

One layer of random experts, all of them in slots, random routes. Prompts run the grouped products,
decode batches the kernels of a captured step; every candidate computes the same. Kernels are timed
in CUDA graphs, so launches do not count. GB/s counts each used expert once, TFLOP/s two operations
a weight and token. The last line is JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from routing.cli import run


@dataclass(frozen=True, kw_only=True)
class TilesSettings:
    """Time the experts' kernels under several tile sizes."""

    shape: str = "olmoe-7b"
    """Model shape: olmoe-7b, qwen3-30b-a3b, mixtral-8x7b or, for a rehearsal, tiny."""
    prompts: list[int] = field(default_factory=lambda: [128, 512, 2048])
    """Tokens of a prompt."""
    batches: list[int] = field(default_factory=lambda: [1, 8])
    """Sequences that decode together."""
    repeats: int = 20
    """Launches in a row, timed together."""
    device: str = "cuda"
    """Where the kernels run; a CPU, interpreted, for a rehearsal."""
    out: Path | None = None
    """File for the JSON."""


class Timed(NamedTuple):
    """One kernel under one candidate."""

    kernel: str
    tokens: int
    candidate: str
    in_use: bool
    seconds: float
    num_bytes: float
    """Of the weights it reads, each used expert once."""
    operations: float


def main(settings: TilesSettings) -> None:
    """Time all candidates, print the best and the present one of each kernel, then all as JSON."""
    import torch

    from benchmarks.machine import command, machine
    from benchmarks.report import print_facts, save, settings_json
    from benchmarks.tile_arms import Bench

    device = torch.device(settings.device)
    facts = {
        "machine": machine(device),
        "command": command("benchmarks.tiles"),
        "settings": settings_json(settings),
    }
    print_facts(facts)
    bench = Bench(settings.shape, device, settings.repeats)
    rows = [row for row in _measured(settings, bench) if row.seconds < math.inf]
    print_table(rows)
    result = facts | {"rows": [row._asdict() for row in rows]}
    save(result, settings.out)
    print(json.dumps(result), flush=True)


def _measured(settings: TilesSettings, bench: Any) -> Iterator[Timed]:
    for prompt in settings.prompts:
        yield from bench.prefill(prompt)
    for batch in settings.batches:
        yield from bench.decode(batch)


def print_table(rows: list[Timed]) -> None:
    """For people: what is in use and the best, of every kernel and number of tokens."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Tiles", title_justify="left")
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


if __name__ == "__main__":
    run(main, TilesSettings, prog="python -m benchmarks.tiles")
