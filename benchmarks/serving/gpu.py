"""Many requests at once on a GPU, under several schedulers: bytes, time and latency.

    python -m benchmarks.serving.gpu --shape olmoe-7b --trace DIR --predictor predictor.onnx

The model has a published shape and random weights. Its requests are passages of a trace of the same
topology; their tokens and routes are replayed, the same for every arm. Memory is equal: rows of the
key/value cache beyond the decode batch are paid for with expert slots. The arms run one after the
other. The router, the predictor, the scheduler and all bookkeeping run and count, in wall-clock
time. An arm is named as in `benchmarks.serving`. The last line is JSON.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving.arm import ServingArm
from benchmarks.serving.load import ServingLoad
from benchmarks.serving.run import ServingRun
from routing.cli import run

if TYPE_CHECKING:
    from benchmarks.replay.recorded_requests import Recorded
    from benchmarks.replay.row_replay import RowReplay
    from benchmarks.systems.subject import Subject
    from runtime.engine.engine import Engine
    from runtime.serving.request import Request


@dataclass(frozen=True, kw_only=True)
class GpuServingSettings(ServingLoad):
    """Serve one workload under several schedulers."""

    trace: Path
    """Trace directory of the shape's topology, the source of requests and routes."""
    predictor: Path
    """ONNX predictor of the model that was traced."""
    shape: str = "olmoe-7b"
    """Model shape: olmoe-7b, or tiny for a rehearsal."""
    arms: list[str] = field(
        default_factory=lambda: ["fifo", "predicted", "predicted,rows=8", "fifo,policy=lru"]
    )
    """Arms to compare; the others are held against `fifo`."""
    residency: list[float] = field(default_factory=lambda: [0.25, 0.125])
    """Shares of all experts that are resident, for arms with no more rows than the batch."""
    budget_seconds: float = 400.0
    """Seconds after which no arm begins."""
    device: str = "cuda"
    """Device that computes; a CPU for a rehearsal."""
    out: Path | None = None
    """File for the JSON."""


def main(settings: GpuServingSettings) -> None:
    """Run every arm, print the table, then the same as JSON."""
    import torch
    import transformers

    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, save, settings_json
    from benchmarks.replay.recorded_requests import recorded_requests
    from benchmarks.serving.report import print_gpu_table
    from benchmarks.systems.subject import Subject

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
        "command": command("benchmarks.serving.gpu"),
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
        rows.append(serve(settings, subject, requests, recorded, ServingArm.parse(name), residency))
        print(rows[-1], flush=True)
        save(facts | {"rows": rows}, settings.out)
    print_gpu_table(settings.shape, settings, rows)
    print(json.dumps(facts | {"rows": rows}), flush=True)


def serve(
    settings: GpuServingSettings,
    subject: Subject,
    requests: Sequence[Request],
    recorded: dict[str, Recorded],
    arm: ServingArm,
    residency: float,
) -> dict[str, Any]:
    """One arm: load, warm up, serve, measure."""
    import torch

    import runtime
    from benchmarks.replay.row_replay import RowReplay
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
        context=options.context if on_gpu else None,
        batch=rows if on_gpu else None,
    ).expertflow
    with engine, replay.installed():
        replayed_run(settings, engine, requests[: 4 * settings.batch], arm, residency, replay)
        loaded = time.perf_counter()
        engine.stats().reset()
        measured = replayed_run(settings, engine, requests, arm, residency, replay)
    return measured.measure() | {
        "rows": rows,
        "resident": share,
        "load_s": loaded - start,
        "link": engine.stats().bytes_loaded / ((subject.bandwidth or math.inf) * measured.busy),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


def replayed_run(
    settings: GpuServingSettings,
    engine: Engine,
    requests: Sequence[Request],
    arm: ServingArm,
    residency: float,
    replay: RowReplay,
) -> ServingRun:
    """Serve all requests, replaying their recorded tokens and routes."""
    from benchmarks.replay.row_replay import ReplayingRunner

    served = ServingRun(
        engine, requests, arm, residency, settings.serve_settings(arm), rate=settings.rate,
        seed=settings.seed, now=time.perf_counter,
    )  # fmt: skip
    loop: Any = served.loop
    replay.cache = loop._cache
    loop._runner = ReplayingRunner(loop._runner, replay)
    while not served.is_done:
        served.step()
    return served


def row_share(subject: Subject, context: int) -> float:
    """Size of a row of the key/value cache, as a share of all experts' bytes."""
    from runtime.kv.size import storage_bytes

    model: Any = subject.model
    layers = subject.topology.stack().layers
    experts = subject.expert_bytes * sum(layer.num_experts for layer in layers)
    return storage_bytes(model, 1, context) / experts


if __name__ == "__main__":
    run(main, GpuServingSettings, prog="python -m benchmarks.serving.gpu")
