"""Many requests at once, under every scheduler: bytes, time and latency.

    python -m benchmarks.serving --model DIR --predictor predictor.onnx --text FOLDER

Prompts of all domains in random order, with outputs of varied length, are served at equal expert
slots, equal decode batch and equal prompt chunk. Everything counts: scheduler, predictor, prefill.
Every arm must generate the same tokens. An arm is named SCHEDULER or SCHEDULER/POLICY or
SCHEDULER/POLICY/ROWS. Arrivals are all at once, or Poisson at `--rate` requests a second. The arms
run side by side, a step each in turn, on one thread; times are CPU seconds, see `Lane`.
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

from routing.cli import run

if TYPE_CHECKING:
    from runtime.serving.request import Request

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """Serve one workload under every scheduler."""

    model: Path
    """Model directory."""
    predictor: Path
    """ONNX predictor of that model."""
    text: Path
    """Folder of .txt files, one a domain; documents are divided by lines `<|endoftext|>`."""
    arms: list[str] = field(
        default_factory=lambda: [
            "fifo/lru",
            "fifo",
            "paper",
            "domain-oracle",
            "predicted/predicted/8",
            "predicted",
        ]
    )
    """What to compare; `fifo` is what the others are compared with."""
    residency: list[float] = field(default_factory=lambda: [0.125, 0.25])
    """Share of all experts that is resident."""
    requests: int = 504
    """Prompts, from all domains alike."""
    prompt_tokens: list[int] = field(default_factory=lambda: [16, 96])
    """Shortest and longest prompt."""
    output_tokens: list[int] = field(default_factory=lambda: [8, 32])
    """Shortest and longest output."""
    rate: float = 0.0
    """Poisson arrivals a CPU second; 0 for all at once."""
    batch: int = 8
    """Sequences that decode together."""
    rows: int = 32
    """Sequences in flight, where the scheduler has a choice."""
    chunk: int = 256
    """Prompt tokens that join a step at the most."""
    dtype: str = "float32"
    """Number format of the model."""
    seed: int = 0
    """Of prompts, lengths and arrivals."""
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
        lanes = [Lane(settings, requests, arm, residency) for arm in settings.arms]
        while waiting := [lane for lane in lanes if not lane.is_done]:
            for lane in waiting:
                lane.turn()
        for lane in lanes:
            rows.append(lane.measure() | {"identical": lane.tokens == lanes[0].tokens})
            _keep(settings, rows[-1])
    _print(settings, rows)


def workload(settings: ServingSettings) -> list[Request]:
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
    file: Path, tokenizer: Any, random: np.random.Generator, settings: ServingSettings, count: int
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


class Lane:
    """One arm: its own copy of the model, its own loop and its own clock, in CPU seconds.

    The lanes take turns, a step each, so that all meet the same load from other programs; and a
    CPU second is the same whoever else wants the processor. Arrivals are in this clock too.
    """

    def __init__(
        self, settings: ServingSettings, requests: Sequence[Request], arm: str, residency: float
    ) -> None:
        import runtime
        from runtime.serving.loop import Loop
        from runtime.serving.settings import ServeSettings

        scheduler, policy, rows = (*arm.split("/"), *("", "predicted", "")[arm.count("/") + 1 :])
        predictor = settings.predictor if policy == "predicted" else None
        model = runtime.load(
            settings.model,
            predictor,
            memory=residency,
            policy=policy,
            dtype=settings.dtype,
            device="cpu",
        )
        self.arm, self.residency = arm, residency
        self.engine = model.expertflow
        options = ServeSettings(
            scheduler=scheduler,
            batch=settings.batch,
            rows=int(rows or settings.rows),
            chunk=settings.chunk,
            lookahead=256,
            context=settings.prompt_tokens[1] + settings.output_tokens[1],
        )
        self.loop = Loop(self.engine, None, options)
        random = np.random.default_rng(settings.seed)
        gaps = random.exponential(1 / settings.rate, len(requests)) if settings.rate else 0.0
        due = np.cumsum(np.broadcast_to(gaps, len(requests)))
        self._coming = list(zip(due.tolist(), requests, strict=True))[::-1]
        self._due = {request.id: at for at, request in self._coming}
        self.clock, self.busy = 0.0, 0.0
        self.latency: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.tokens: dict[str, tuple[int, ...]] = {}

    @property
    def is_done(self) -> bool:
        return not self._coming and self.loop.is_idle

    def turn(self) -> None:
        """Submit what is due and run one step."""
        if self.loop.is_idle and self._coming:
            self.clock = max(self.clock, self._coming[-1][0])
        while self._coming and self._coming[-1][0] <= self.clock:
            self.loop.submit(self._coming.pop()[1])
        start = time.process_time()
        results = self.loop.step()
        seconds = time.process_time() - start
        self.clock += seconds
        self.busy += seconds
        started = (job.request.id for job in self.loop.active if job.num_generated)
        for id in (*started, *(result.id for result in results)):
            self.first.setdefault(id, self.clock - self._due[id])
        for result in results:
            self.latency[result.id] = self.clock - self._due[result.id]
            self.tokens[result.id] = result.token_ids

    def measure(self) -> dict[str, Any]:
        """What there is to say once all requests ended."""
        loop, stats = self.loop, self.engine.stats()
        payoff = getattr(loop.scheduler.ordering, "payoff", None)
        latency, first = (list(times.values()) for times in (self.latency, self.first))
        return {
            "arm": self.arm,
            "residency": self.residency,
            "cpu_seconds": self.busy,
            "wall_seconds": loop.seconds,
            "steps": loop.num_steps,
            "generated": loop.num_generated,
            "prefilled": loop.num_prefilled,
            "loads": stats.misses,
            "bytes_per_token": stats.bytes_loaded / loop.num_generated,
            "hit_rate": stats.hit_rate,
            "recall": stats.recall,
            "tokens_per_cpu_second": loop.num_generated / self.busy,
            "tokens_per_wall_second": loop.num_generated / loop.seconds,
            "p50": float(np.percentile(latency, 50)),
            "p99": float(np.percentile(latency, 99)),
            "first_token_p50": float(np.percentile(first, 50)),
            "first_token_p99": float(np.percentile(first, 99)),
            "scheduler_share": loop.scheduler.seconds / loop.seconds,
            "predictor_share": stats.seconds["predict"] / loop.seconds,
            "load_share": stats.seconds["load"] / loop.seconds,
            "rested": 0 if payoff is None else payoff.times_rested,
        }


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
    heads = "resident arm KiB/token vs tok/CPU-s vs tok/s vs p50 p99 vs"
    for head in f"{heads} scheduler predictor loads rested tokens".split():
        table.add_column(head, justify="right")
    for row in rows:
        base = _base(rows, row)
        table.add_row(
            f"{row['residency']:.1%}",
            row["arm"],
            f"{row['bytes_per_token'] / 1024:.0f}",
            f"{row['bytes_per_token'] / base['bytes_per_token'] - 1:+.1%}",
            f"{row['tokens_per_cpu_second']:.1f}",
            f"{row['tokens_per_cpu_second'] / base['tokens_per_cpu_second'] - 1:+.1%}",
            f"{row['tokens_per_wall_second']:.1f}",
            f"{row['tokens_per_wall_second'] / base['tokens_per_wall_second'] - 1:+.1%}",
            f"{row['p50']:.1f} s",
            f"{row['p99']:.1f} s",
            f"{row['p99'] / base['p99']:.2f}x",
            f"{row['scheduler_share']:.2%}",
            f"{row['predictor_share']:.1%}",
            f"{row['load_share']:.1%}",
            str(row["rested"]),
            "identical" if row["identical"] else "DIFFERENT",
        )
    console = Console(width=190)
    console.print(f"{platform.machine()}; python -m benchmarks.serving {shlex.join(sys.argv[1:])}")
    console.print(table)


def _base(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """First come, first served with the predicted policy at the same residency, if it ran."""
    same = [other for other in rows if other["residency"] == row["residency"]]
    return next((other for other in same if other["arm"] == "fifo"), same[0])


if __name__ == "__main__":
    run(main, ServingSettings, prog="python -m benchmarks.serving")
