"""Other systems on the same prompts: transformers' continuous batching, accelerate's offloading.

Their models have the same shape and random weights. Greedy decoding of a random model soon repeats
itself, and all sequences would take the same few experts. So each pass takes the routes of recorded
tokens: those of its first tokens are the first recorded ones, whichever sequence they belong to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.shapes import Shape, build_model, layer_bytes
from benchmarks.replay.text_replay import router_of
from benchmarks.systems import other_systems
from benchmarks.systems.clock import Clock, Enough
from benchmarks.systems.placement import place
from benchmarks.throughput.arm import ACCELERATE, ThroughputArm
from benchmarks.throughput.continuous import serve_continuously
from benchmarks.throughput.requests import Load, context_of
from benchmarks.throughput.settings import ThroughputSettings
from routing.layers import MoELayer, find_moe_layers
from runtime.cuda.options import WIDE_SIZES
from runtime.kv.size import storage_bytes
from runtime.sizing.units import parse_memory

SIZES = 1, 2, 4, 8, 16, 32, *WIDE_SIZES
ROUTED = 1 << 15
"""Recorded tokens whose routes passes take, at the most."""
LAYERS_ON_GPU = 2
"""Of experts, while one is copied and the one before is given back."""


class Served(NamedTuple):
    """What a system generated."""

    seconds: float
    tokens: int
    prompt_tokens: int
    ended: int
    """Requests."""
    steps: int | None = None


def run_rival(
    settings: ThroughputSettings, shape: Shape, load: Load, arm: ThroughputArm
) -> dict[str, Any]:
    """One arm of another system. Raises ValueError for requests of mixed lengths: it gives all of
    them as many tokens.
    """
    if settings.least_tokens is not None:
        raise ValueError(f"{arm.name}: other systems are compared without --least_tokens")
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model: Any = build_model(shape, device, seed=settings.seed)
    layers = find_moe_layers(model)
    batch = arm.batch or largest_batch(settings, model, layers, arm)
    prompts = [
        load.recorded[one.id].token_ids_T[: -settings.tokens].tolist()
        for one in load.requests[: settings.rival_requests]
    ]
    with _routed(model, layers, load, device):
        if arm.system == ACCELERATE:
            served, load_s = _offloaded(model, prompts, settings, batch, start)
        else:
            place(model, device, experts=True)
            on_gpu = device.type == "cuda"
            model.set_experts_implementation("grouped_mm" if on_gpu else "batched_mm")
            load_s = time.perf_counter() - start
            served = Served(*serve_continuously(model, prompts, settings, batch))
    count = sum(layer.num_experts for layer in layers)
    return {
        "arm": arm.name, "batch": batch, "load_s": load_s,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "tokens_per_s": served.tokens / served.seconds,
        "prompt_tokens_per_s": served.prompt_tokens / served.seconds,
        "seconds": served.seconds, "steps": served.steps, "ended": served.ended,
        "requests": len(prompts), "is_whole": served.ended == len(prompts),
        "slots": 0 if arm.system == ACCELERATE else count, "experts": count,
    }  # fmt: skip


def largest_batch(
    settings: ThroughputSettings, model: Any, layers: Sequence[MoELayer], arm: ThroughputArm
) -> int:
    """The most sequences beside which a layer's experts fit. Raises ValueError where none do."""
    memory, context = parse_memory(arm.residency), context_of(settings)
    if isinstance(memory, float):
        raise ValueError(f"{arm.name}: give the GPU memory in all, as 24GiB")
    config = model.config
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    experts = [layer_bytes(layer) for layer in layers]
    room = memory - (whole - sum(experts)) - LAYERS_ON_GPU * max(experts)
    token = layers[0].top_k * (2 * config.hidden_size) + 8 * config.hidden_size
    each = (
        storage_bytes(model, 1, context)
        + settings.prompt_tokens[1] * token * model.dtype.itemsize
        + 2 * 4 * config.vocab_size
    )
    fitting = [size for size in SIZES if size * each <= room]
    if not fitting:
        raise ValueError(f"{arm.name}: not one sequence fits; give more memory")
    return min(fitting[-1], settings.rival_requests)


def _offloaded(
    model: Any, prompts: Sequence[list[int]], settings: ThroughputSettings, batch: int,
    start: float,
) -> tuple[Served, float]:  # fmt: skip
    """Batch after batch by `generate` until the time is over, which cuts the last one short."""
    device = torch.device(settings.device)
    with _hooked(model, device):
        load_s = time.perf_counter() - start
        began = time.perf_counter()
        served = Served(0.0, 0, 0, 0, 0)
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            left = settings.arm_seconds - (time.perf_counter() - began)
            if left <= 0:
                break
            steps, was_cut = _generate(model, some, settings, left)
            served = Served(
                time.perf_counter() - began,
                served.tokens + steps * len(some),
                served.prompt_tokens + sum(map(len, some)),
                served.ended + (0 if was_cut else len(some)),
                (served.steps or 0) + steps,
            )
    return served, load_s


@contextmanager
def _hooked(model: Any, device: torch.device) -> Iterator[None]:
    """Experts on the CPU, copied when they run; on a CPU all modules, for a rehearsal."""
    if device.type == "cuda":
        with other_systems.accelerated(model, device):
            yield
        return
    import_module("accelerate").cpu_offload(model, device)
    try:
        yield
    finally:
        import_module("accelerate.hooks").remove_hook_from_submodules(model)


def _generate(
    model: Any, prompts: Sequence[list[int]], settings: ThroughputSettings, seconds: float
) -> tuple[int, bool]:
    """Tokens of each sequence, and whether the clock ended them."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    clock = Clock(max_seconds=seconds)
    with suppress(Enough):
        model.generate(
            ids_BT.to(settings.device), attention_mask=mask_BT.to(settings.device), streamer=clock,
            max_new_tokens=settings.tokens, do_sample=False,
        )  # fmt: skip
    return len(clock.seconds), len(clock.seconds) < settings.tokens


@contextmanager
def _routed(
    model: Any, layers: Sequence[MoELayer], load: Load, device: torch.device
) -> Iterator[None]:
    """While active, routers return recorded routes."""
    routes_NLK = np.concatenate([one.experts_TLK for one in load.recorded.values()])[:ROUTED]
    routes_LNK = torch.from_numpy(routes_NLK.astype(np.int64)).transpose(0, 1).to(device)
    routers = [router_of(model, layer.name) for layer in layers]
    for layer, router in enumerate(routers):
        router.forward = partial(_route, routes_LNK[layer], router.forward)
    try:
        yield
    finally:
        for router in routers:
            router.__dict__.pop("forward", None)


def _route(routes_NK: Tensor, own: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, weights_TK, _ = own(hidden)
    at_T = torch.arange(len(weights_TK), device=weights_TK.device) % len(routes_NK)
    return logits, weights_TK, routes_NK.index_select(0, at_T)
