"""The run of one arm: load, serve all requests, measure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.common.coded_models import coded_source
from benchmarks.common.shapes import Shape
from benchmarks.replay.row_replay import ReplayingRunner, RowReplay
from benchmarks.systems.placement import free_memory
from benchmarks.throughput.arm import PAGES, SPILL, ThroughputArm, running_as
from benchmarks.throughput.bounds import Machine, Step, Weights, step_of
from benchmarks.throughput.requests import Load, context_of
from benchmarks.throughput.settings import ThroughputSettings
from runtime.batch.lengths import Length, tokens_together
from runtime.cuda.options import CudaOptions
from runtime.cuda.row_choices import row_choices
from runtime.engine.cpu_backend import CpuBackend
from runtime.engine.engine import Engine
from runtime.kv.pages.places import PAGE
from runtime.kv.storage import StorageSize
from runtime.loading import choose_policy, offload_on_gpu
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from runtime.sizing.budget import slot_budget
from runtime.sizing.row_plan import best_choice
from runtime.sizing.units import parse_memory
from runtime.weights.source import Source

MEASURED = 0.8
"""The share of the rows that is in flight in the steps whose time is called a full step's."""
WARM_UP_TOKENS = 8


def run_arm(
    settings: ThroughputSettings, shape: Shape, load: Load, arm: ThroughputArm, speeds: Machine
) -> dict[str, Any]:
    """One arm."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    source = coded_source(shape, arm.encoding, device, seed=settings.seed)
    context = context_of(settings)
    weights = Weights.of(source, context)
    tokens_of = cache_tokens(settings, arm, load)
    size = chosen_size(settings, source, arm, tokens_of)
    batch, tokens = size.batch, size.tokens
    replay = RowReplay(source.model, load.recorded, batch, device, layers=source.layers)
    with (
        replay.installed(),
        running_as(arm),
        offloaded(settings, source, arm, size) as engine,
    ):
        load_s = time.perf_counter() - start
        serve = ServeSettings(
            scheduler="fifo", batch=batch, rows=batch, chunk=settings.chunk, context=context,
            lookahead=len(load.requests), cache_tokens=tokens,
        )  # fmt: skip
        loop: Any = ServingLoop(engine, None, serve)
        replay.cache = loop._cache
        loop._runner = ReplayingRunner(loop._runner, replay)
        began = time.perf_counter()
        for request in load.requests[: settings.warm_up]:
            loop.submit(replace(request, max_tokens=min(WARM_UP_TOKENS, request.max_tokens)))
        while not loop.is_idle:
            loop.step()
        warm_up_s = time.perf_counter() - began
        for request in load.requests:
            loop.submit(request)
        found = measured(loop, engine, settings, batch)
        step = step_of(weights, engine.stats())
        engine.check_integrity()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    timed = {"load_s": load_s, "warm_up_s": warm_up_s, "peak_bytes": peak}
    sized = {"batch": batch, "cache_tokens": tokens, "spill_tokens": size.spilled}
    return {"arm": arm.name} | sized | timed | bounded(found, batch, step, speeds)


def chosen_size(
    settings: ThroughputSettings, source: Source, arm: ThroughputArm,
    tokens_of: Callable[[int], int | None],
) -> StorageSize:  # fmt: skip
    """Sequences, as many as `runtime.batch` would choose where the arm leaves it open, and room for
    their tokens. Raises ValueError where none fit.
    """
    device, context = torch.device(settings.device), context_of(settings)
    if device.type != "cuda" or (arm.batch and arm.way != SPILL):
        batch = arm.batch or min(ServeSettings.batch, settings.requests)
        return StorageSize(batch, context, tokens_of(batch))
    choices = list(
        row_choices(
            source, parse_memory(arm.residency), context=context,
            most=arm.batch or settings.requests, device=device, tokens_of=tokens_of,
            spill_tokens=None if arm.way == SPILL else 0,
        )
    )  # fmt: skip
    free_memory()
    fitting = [choice for choice in choices if choice.rows >= (arm.batch or 0)]
    if not fitting:
        raise ValueError(f"{arm.name}: no such number of sequences fits; give more memory")
    chosen = fitting[0] if arm.batch else best_choice(fitting)
    batch = arm.batch or chosen.rows
    tokens = tokens_of(batch) if arm.way != SPILL else chosen.cache_tokens
    return StorageSize(batch, context, tokens, chosen.spill_tokens)


def cache_tokens(
    settings: ThroughputSettings, arm: ThroughputArm, load: Load
) -> Callable[[int], int | None]:
    """Tokens of the key/value cache by the number of sequences, as a batch of these requests
    reserves them; None: as many as the longest needs, for each sequence.
    """
    if arm.way not in (PAGES, SPILL):
        return lambda _: None
    lengths = [Length(len(one.prompt), one.max_tokens) for one in load.requests]
    return tokens_together(lengths, context_of(settings), PAGE)


def offloaded(
    settings: ThroughputSettings, source: Source, arm: ThroughputArm, size: StorageSize
) -> Engine:
    """The model, offloaded as the arm says. size: of the key/value cache."""
    device, budget = torch.device(settings.device), parse_memory(arm.residency)
    policy = choose_policy(None, source, None, None)
    if device.type == "cuda":
        options = CudaOptions(
            context=size.context, batch=size.batch, cpu_share=False, cache_tokens=size.tokens,
            spill_tokens=size.spilled or None,
        )  # fmt: skip
        engine: Engine = offload_on_gpu(source, budget, device, policy, options).expertflow
        return engine
    backend = CpuBackend(source, slot_budget(budget, source), device, policy)
    return Engine(source, backend, None, None, device)


def measured(loop: Any, engine: Engine, settings: ThroughputSettings, batch: int) -> dict[str, Any]:
    """Serve until all requests have ended, or the time is over."""
    stats = engine.stats()
    stats.reset()
    steps: list[tuple[float, int, int]] = []
    start = time.perf_counter()
    done = 0
    while not loop.is_idle and time.perf_counter() - start < settings.arm_seconds:
        began, generated, prefilled = time.perf_counter(), loop.num_generated, loop.num_prefilled
        done += len(loop.step())
        seconds = time.perf_counter() - began
        steps.append((seconds, loop.num_generated - generated, loop.num_prefilled - prefilled))
    seconds, is_whole = time.perf_counter() - start, loop.is_idle
    stats = engine.stats()
    loop.cancel_all()
    other = [s for s, new, _ in steps if new < MEASURED * batch]
    full = [s for s, new, prompt in steps if new >= MEASURED * batch and not prompt]
    mixed = [s for s, new, prompt in steps if new >= MEASURED * batch and prompt]
    return {
        "tokens_per_s": sum(new for _, new, _ in steps) / seconds,
        "prompt_tokens_per_s": sum(prompt for *_, prompt in steps) / seconds,
        "seconds": seconds,
        "steps": len(steps),
        "ended": done,
        "is_whole": is_whole,
        **_median("full_step", full),
        **_median("mixed_step", mixed),
        **_median("other_step", other),
        "bytes": stats.bytes_loaded,
        "bytes_wasted": stats.bytes_wasted,
        "bytes_spilled": stats.bytes_spilled,
        "pages_moved": pages.num_moved if (pages := loop._cache.pages) else 0,
        "hit_rate": stats.hit_rate,
        "failed_steps": loop.num_failed_steps,
        "displaced": loop.num_displaced,
        "key_value_bytes": loop.key_value_bytes,
        "slots": stats.num_slots,
        "experts": stats.total_experts,
    }


def _median(name: str, seconds: list[float]) -> dict[str, Any]:
    """Of the steps of a kind: their median, number and sum."""
    median = 1e3 * float(np.median(seconds)) if seconds else None
    return {f"{name}_ms": median, f"{name}s": len(seconds), f"{name}s_s": sum(seconds)}


def bounded(found: dict[str, Any], batch: int, step: Step, speeds: Machine) -> dict[str, Any]:
    """With the seconds that the link alone takes for what crossed it, their share, and the speed
    that the machine allows at the most: a step's spilled keys and values cross it as well.
    """
    crossed = found["bytes"] + found["bytes_spilled"]
    step = step._replace(
        missing_bytes=step.missing_bytes + found["bytes_spilled"] / max(1, found["steps"])
    )
    link_s = crossed / speeds.link if speeds.link else None
    least = step.seconds(speeds, batch)
    most = batch / max(least.values()) if least else None
    return found | {
        "link_s": link_s,
        "of_link": link_s and link_s / found["seconds"],
        "step": step._asdict(),
        "bound": max(least, key=least.__getitem__) if least else None,
        "bound_tokens_per_s": most,
        "of_bound": most and found["tokens_per_s"] / most,
    }
