"""Live comparison of the cache policies on one workload, against the model without offloading.

A *workload* runs a model over some text and returns the tokens that it chose. It generates after
prompts, or decodes a text one token at a time as if it were being generated (teacher forcing).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import runtime
from routing.layers import MoELayer, find_moe_layers, read_routes
from routing.topology import NO_EXPERT
from runtime.cache.policies import LIVE_FREE_RULES

Workload = Callable[[Any], list[list[int]]]
Calls = list[tuple[int, np.ndarray]]
"""The experts calls of a workload in order: the layer, and the ids of the experts that it used."""
RecordedRoutes = list[tuple[int, np.ndarray]]
"""The same, with the experts of every token: int64 [T, K], NO_EXPERT where there is none."""

POLICIES = (*LIVE_FREE_RULES, "predicted", "belady")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The result of one policy at one residency; the predictor's time counts."""

    policy: str
    residency: float
    """Share of the experts that are resident."""
    slots: int
    identical: bool
    """The tokens are those of the model without offloading."""
    hit_rate: float
    requests: int
    """Experts that calls needed; one is counted once a call."""
    loads: int
    """Experts loaded into a slot."""
    bytes_loaded: int
    tokens: int
    """Tokens that went through the model, of prompts too."""
    seconds: float
    """Time of the whole workload."""
    recall: float
    """Recall@K of the predictor on decoded tokens; NaN without a predictor."""
    prediction_ms: float
    """Median time of a prediction; NaN without a predictor."""


def generate_after(prompts: Sequence[Tensor], new_tokens: int) -> Workload:
    """Greedy generation after each prompt (int64 [1, T]), one after the other."""

    def run(model: Any) -> list[list[int]]:
        return [
            model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
            for prompt in prompts
        ]

    return run


def teacher_forced(texts: Sequence[Tensor]) -> Workload:
    """Decoding of each text (int64 [1, T]) token by token; returns the greedy choice at each."""

    @torch.no_grad()
    def run(model: Any) -> list[list[int]]:
        chosen: list[list[int]] = []
        for text in texts:
            cache, row = None, []
            for position in range(text.shape[1]):
                output = model(
                    text[:, position : position + 1], past_key_values=cache, use_cache=True
                )
                cache = output.past_key_values
                row.append(int(output.logits[0, -1].argmax()))
            chosen.append(row)
        return chosen

    return run


def compare(
    model: nn.Module,
    workload: Workload,
    *,
    predictor: str | Path,
    residency: Sequence[float],
    policies: Sequence[str] = POLICIES,
    on_run: Callable[[Run], None] = lambda run: None,
) -> tuple[list[Run], float]:
    """Run `workload` without offloading, then under every policy at every residency.

    Returns the runs, and the seconds that the model took without offloading. Its experts calls were
    recorded meanwhile, for Belady's policy, which takes a part of that time.
    """
    routes: RecordedRoutes = []
    workload_start = time.perf_counter()
    with record_routes(model, routes):
        expected = workload(model)
    stock_seconds = time.perf_counter() - workload_start
    calls = calls_of(routes)
    runs = []
    for share in residency:
        for policy in policies:
            run = run_offloaded(
                model,
                workload,
                expected,
                predictor=predictor,
                policy=policy,
                share=share,
                replay=calls if policy == "belady" else None,
            )
            runs.append(run)
            on_run(run)
    return runs, stock_seconds


@contextmanager
def record_routes(model: nn.Module, routes: RecordedRoutes) -> Iterator[None]:
    """Append the routes of every experts call within the context to `routes`."""
    layers = find_moe_layers(model)
    hooks = [
        layer.module.register_forward_pre_hook(
            partial(_record, routes, index, layer), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _record(
    routes: RecordedRoutes, index: int, layer: MoELayer, _: nn.Module, args: Any, kwargs: Any
) -> None:
    routes.append((index, read_routes(layer, args, kwargs).experts_TK.numpy()))


def calls_of(routes: RecordedRoutes) -> Calls:
    """The experts calls of recorded routes, in the form of Belady's policy."""
    used = ((layer, np.unique(experts_TK)) for layer, experts_TK in routes)
    return [(layer, experts[experts != NO_EXPERT]) for layer, experts in used]


def run_offloaded(
    model: nn.Module,
    workload: Workload,
    expected: list[list[int]],
    *,
    predictor: str | Path | None,
    policy: str,
    share: float,
    replay: Calls | None = None,
) -> Run:
    """Run `workload` under one policy at one residency; `expected` are its tokens without.

    replay: for Belady's policy the calls to come, for the hot set those to count.
    """
    offloaded = runtime.load(
        model,
        predictor if policy == "predicted" else None,
        memory=share,
        policy=policy,
        replay=replay,
    )
    with offloaded.expertflow as engine:
        start = time.perf_counter()
        tokens = workload(offloaded)
        seconds = time.perf_counter() - start
        engine.check_integrity()
        stats = engine.stats()
    return Run(
        policy=policy,
        residency=share,
        slots=stats.num_slots,
        identical=tokens == expected,
        hit_rate=stats.hit_rate,
        requests=stats.hits + stats.misses,
        loads=stats.misses,
        bytes_loaded=stats.bytes_loaded,
        tokens=stats.tokens,
        seconds=seconds,
        recall=stats.recall,
        prediction_ms=stats.prediction_ms_median,
    )
