"""Many requests at once on a GPU, under several schedulers: bytes, time and latency.

    python -m benchmarks.serving_gpu --shape olmoe-7b --trace DIR --predictor predictor.onnx

The model has the shape of a published one and random weights; its requests are passages of a trace
of the same topology, and their routes and tokens are replayed from it, for every arm alike. Memory
is equal: rows of the key/value cache beyond the decode batch are paid for with expert slots. The
arms run one after the other; the router, the predictor, the scheduler and all bookkeeping run and
count, by the clock on the wall. An arm is named as in `benchmarks.serving`. The last line is JSON.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lane import Arm, Lane
from benchmarks.serving_load import ServingLoad
from routing.cli import run

if TYPE_CHECKING:
    from benchmarks.recorded_requests import Recorded
    from benchmarks.row_replay import RowReplay
    from benchmarks.subject import Subject
    from runtime.engine.engine import Engine
    from runtime.serving.request import Request


@dataclass(frozen=True, kw_only=True)
class GpuServingSettings(ServingLoad):
    """Serve one workload under several schedulers."""

    trace: Path
    """Trace directory of the shape's topology, to take requests and routes from."""
    predictor: Path
    """ONNX predictor of the model that was traced."""
    shape: str = "olmoe-7b"
    """Model shape: olmoe-7b or, for a rehearsal, tiny."""
    arms: list[str] = field(
        default_factory=lambda: ["fifo", "predicted", "predicted,rows=8", "fifo,policy=lru"]
    )
    """What to compare; `fifo` is what the others are compared with."""
    residency: list[float] = field(default_factory=lambda: [0.25, 0.125])
    """Share of all experts that is resident, where no more rows are used than decode together."""
    budget_seconds: float = 400.0
    """No arm begins after so much time."""
    device: str = "cuda"
    """Where the model computes; a CPU for a rehearsal."""
    out: Path | None = None
    """File for the JSON."""


def main(settings: GpuServingSettings) -> None:
    """Run every arm, print the table, then the same as JSON."""
    import torch
    import transformers

    from benchmarks.machine import command, machine
    from benchmarks.recorded_requests import recorded_requests
    from benchmarks.report import print_facts, save, settings_json
    from benchmarks.subject import Subject

    transformers.utils.logging.set_verbosity_error()
    start, device = time.perf_counter(), torch.device(settings.device)
    subject = Subject(
        settings.shape,
        device,
        trace=settings.trace,
        predictor=settings.predictor,
        seed=settings.seed,
    )
    facts = {
        "machine": machine(device),
        "command": command("benchmarks.serving_gpu"),
        "model": subject.facts,
        "settings": settings_json(settings),
    }
    print_facts(facts)
    requests, recorded = recorded_requests(
        settings.trace,
        settings.requests,
        prompt_tokens=settings.prompt_tokens,
        output_tokens=settings.output_tokens,
        seed=settings.seed,
    )
    rows: list[dict[str, Any]] = []
    for residency, name in ((share, arm) for share in settings.residency for arm in settings.arms):
        if time.perf_counter() - start > settings.budget_seconds:
            print(f"no time left for {name} at {residency:.1%}", flush=True)
            continue
        rows.append(serve(settings, subject, requests, recorded, Arm.parse(name), residency))
        print(rows[-1], flush=True)
        save(facts | {"rows": rows}, settings.out)
    print_table(settings, rows)
    print(json.dumps(facts | {"rows": rows}), flush=True)


def serve(
    settings: GpuServingSettings,
    subject: Subject,
    requests: Sequence[Request],
    recorded: dict[str, Recorded],
    arm: Arm,
    residency: float,
) -> dict[str, Any]:
    """One arm: load, warm up, serve, measure."""
    import torch

    import runtime
    from benchmarks.row_replay import RowReplay
    from runtime.serving.scheduling.scheduler import num_rows

    options = settings.serve_settings(arm)
    rows = num_rows(options, arm.scheduler)
    share = residency + arm.extra - (rows - settings.batch) * row_share(subject, options.context)
    if share <= 0:
        raise ValueError(f"{rows} rows take more memory than {residency:.1%} of the experts")
    on_gpu = subject.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    replay = RowReplay(subject.model, recorded, rows, subject.device)
    start = time.perf_counter()
    engine = runtime.load(
        subject.model,
        subject.predictor if arm.policy == "predicted" else None,
        memory=share,
        policy=arm.policy,
        device=subject.device,
        context=options.context,
        batch=rows,
    ).expertflow
    with engine, replay.installed():
        run_lane(settings, engine, requests[: 4 * settings.batch], arm, residency, replay)
        loaded = time.perf_counter()
        engine.stats().reset()
        lane = run_lane(settings, engine, requests, arm, residency, replay)
    return lane.measure() | {
        "rows": rows,
        "resident": share,
        "load_s": loaded - start,
        "link": engine.stats().bytes_loaded / ((subject.bandwidth or math.inf) * lane.busy),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


def run_lane(
    settings: GpuServingSettings,
    engine: Engine,
    requests: Sequence[Request],
    arm: Arm,
    residency: float,
    replay: RowReplay,
) -> Lane:
    """Serve requests that say and use what was recorded."""
    from benchmarks.row_replay import ReplayingRunner

    lane = Lane(
        engine, requests, arm, residency, settings.serve_settings(arm), rate=settings.rate,
        seed=settings.seed, now=time.perf_counter,
    )  # fmt: skip
    loop: Any = lane.loop
    replay.cache = loop._cache
    loop._runner = ReplayingRunner(loop._runner, replay)
    while not lane.is_done:
        lane.turn()
    return lane


def row_share(subject: Subject, context: int) -> float:
    """What a row of the key/value cache takes, as a share of all experts' bytes."""
    from runtime.kv.size import storage_bytes

    model: Any = subject.model
    layers = subject.topology.stack().layers
    experts = subject.expert_bytes * sum(layer.num_experts for layer in layers)
    return storage_bytes(model.config, 1, context, model.dtype) / experts


def print_table(settings: GpuServingSettings, rows: Sequence[dict[str, Any]]) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    arrivals = f"{settings.rate:g} a second" if settings.rate else "all at once"
    title = f"{settings.shape}, {settings.requests} requests, {arrivals}, batch {settings.batch}"
    table = Table(title=title, title_justify="left")
    heads = "resident arm MB/token vs tok/s vs p50 p99 vs hits recall link scheduler rested GiB"
    for head in heads.split():
        table.add_column(head, justify="right")
    for row in rows:
        same = [other for other in rows if other["residency"] == row["residency"]]
        base = next((other for other in same if other["arm"] == "fifo"), row)
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


if __name__ == "__main__":
    run(main, GpuServingSettings, prog="python -m benchmarks.serving_gpu")
