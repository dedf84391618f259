"""Many requests at once, under every scheduler: bytes, time and latency.

    python -m benchmarks.serving --model DIR --predictor predictor.onnx --text FOLDER

Prompts of all domains in random order, with outputs of varied length, are served at equal expert
slots, equal decode batch and equal prompt chunk. Everything counts: scheduler, predictor, prefill.
Every arm must generate the same tokens. An arm is SCHEDULER, or SCHEDULER,KEY=VALUE,... with a
`policy`, a share of `extra` experts, or fields of `ServeSettings`. Arrivals are all at once, or
Poisson at `--rate` requests a second. The arms run side by side, a step each in turn, on one
thread; times are CPU seconds.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.lane import Arm, Lane
from benchmarks.serving_load import TextLoad
from routing.cli import run

if TYPE_CHECKING:
    from runtime.serving.request import Request

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class ServingSettings(TextLoad):
    """Serve one workload under every scheduler."""

    predictor: Path
    """ONNX predictor of that model."""
    arms: list[str] = field(
        default_factory=lambda: [
            "fifo,policy=lru",
            "fifo",
            "paper",
            "domain-oracle",
            "predicted,rows=8",
            "predicted",
        ]
    )
    """What to compare; `fifo` is what the others are compared with."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25])
    """Share of all experts that is resident."""
    dtype: str = "float32"
    """Number format of the model."""
    out: Path | None = None
    """Append the results to this file, one JSON line an arm."""


def main(settings: ServingSettings) -> None:
    """Run every arm, print the table."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    requests = workload(settings)
    rows: list[dict[str, Any]] = []
    for residency in settings.residency:
        lanes = [lane(settings, requests, Arm.parse(arm), residency) for arm in settings.arms]
        while waiting := [one for one in lanes if not one.is_done]:
            for one in waiting:
                one.turn()
        for one in lanes:
            rows.append(one.measure() | {"identical": one.tokens == lanes[0].tokens})
            _keep(settings, rows[-1])
    _print(settings, rows)


def lane(
    settings: ServingSettings, requests: Sequence[Request], arm: Arm, residency: float
) -> Lane:
    """An arm with a copy of the model of its own, timed in CPU seconds.

    The lanes take turns, a step each, so that all meet the same load from other programs; and a
    CPU second is the same whoever else wants the processor.
    """
    import runtime

    engine = runtime.load(
        settings.model,
        settings.predictor if arm.policy == "predicted" else None,
        memory=residency + arm.extra,
        policy=arm.policy,
        dtype=settings.dtype,
        device="cpu",
    ).expertflow
    return Lane(
        engine, requests, arm, residency, settings.serve_settings(arm), rate=settings.rate,
        seed=settings.seed, now=time.process_time,
    )  # fmt: skip


def workload(settings: TextLoad) -> list[Request]:
    """The same requests for every arm, labelled by domain."""
    from transformers import AutoTokenizer

    from runtime.serving.request import Request

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    random = np.random.default_rng(settings.seed)
    files = sorted(settings.text.glob("*.txt"))
    if not files:
        raise ValueError(f"there are no .txt files in {settings.text}")
    prompts = [
        (file.stem, ids)
        for file in files
        for ids in _prompts(file, tokenizer, random, settings, -(-settings.requests // len(files)))
    ]
    low, high = settings.output_tokens
    return [
        Request(
            id=str(number),
            prompt=ids,
            label=label,
            ignore_eos=True,
            max_tokens=int(random.integers(low, high + 1)),
        )
        for number, (label, ids) in enumerate(prompts[i] for i in random.permutation(len(prompts)))
    ][: settings.requests]


def _prompts(
    file: Path, tokenizer: Any, random: np.random.Generator, settings: TextLoad, count: int
) -> Iterator[list[int]]:
    """`count` passages of a domain, from the starts of its documents and on through the longest."""
    documents = [text for text in file.read_text().split(f"\n{SEPARATOR}\n") if text.strip()]
    longest = settings.prompt_tokens[1]
    starts = [
        (text, at) for at in range(0, 40) for text in documents if len(text) > 6 * longest * at
    ]
    for text, at in starts[:count]:
        ids = tokenizer(text[6 * longest * at : 6 * longest * (at + 1)]).input_ids
        yield ids[: int(random.integers(settings.prompt_tokens[0], longest + 1))]


def _keep(settings: ServingSettings, row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr)
    if settings.out is not None:
        facts = {"model": settings.model.name, "rate": settings.rate, "batch": settings.batch}
        with settings.out.open("a") as file:
            file.write(json.dumps(facts | row) + "\n")


def _print(settings: ServingSettings, rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    arrivals = f"{settings.rate} a second" if settings.rate else "all at once"
    table = Table(
        title=f"{settings.requests} requests, {arrivals}, batch {settings.batch}",
        title_justify="left",
    )
    heads = "resident arm KiB/token vs tok/CPU-s vs tok/s vs p50 p99 vs first-p99"
    for head in f"{heads} scheduler predictor loads KV-MiB outlook-MiB rested tokens".split():
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
            f"{row['outlook_bytes'] / 2**20:.1f}",
            str(row["rested"]),
            "identical" if row["identical"] else "DIFFERENT",
        )
    console = Console(width=230)
    console.print(f"{platform.machine()}; python -m benchmarks.serving {shlex.join(sys.argv[1:])}")
    console.print(table)


def _base(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """First come, first served with the predicted policy at the same residency, if it ran."""
    same = [other for other in rows if other["residency"] == row["residency"]]
    return next((other for other in same if other["arm"] == "fifo"), same[0])


if __name__ == "__main__":
    run(main, ServingSettings, prog="python -m benchmarks.serving")
