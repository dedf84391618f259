"""The arms of the benchmark, each in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import compile_times, counters
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.common.coded_models import coded_source
from benchmarks.common.shapes import Shape, shape_named
from benchmarks.compiling.operations import compare
from benchmarks.compiling.settings import CompilingSettings
from runtime.cuda.compiling.compiled_forward import COMPILER
from runtime.cuda.decode.graph_step import CapturedStep
from runtime.cuda.options import CudaOptions
from runtime.loading import choose_policy, offload_on_gpu

DEVICE = "cuda:0"
PROMPT = 16
PHASES = {
    "tracing": "bytecode_tracing",
    "compiler": "OutputGraph.call_user_compiler",
    "guards": "build_guards",
    "cached graph": "AOTAutogradCache.inductor_load",
    "all of it": "_compile.compile_inner",
}
"""What torch calls the parts of a compilation."""
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rounding as eager": {"emulate_precision_casts": True},
    "cuBLAS": {"coordinate_descent_tuning": False},
    "rounding as eager, cuBLAS": {
        "emulate_precision_casts": True,
        "coordinate_descent_tuning": False,
    },
}
LONGEST_WAIT = 120.0


def run_arm(settings: CompilingSettings) -> dict[str, Any]:
    """One arm: first, second, auto or numbers."""
    if settings.arm == "auto":
        return auto(settings)
    if settings.arm == "numbers":
        return numbers(settings)
    return first_step(settings)


@contextmanager
def loaded(settings: CompilingSettings, shape: Shape, compile: bool | str) -> Iterator[Any]:
    """A random model, offloaded."""
    device = torch.device(DEVICE)
    source = coded_source(shape, settings.encoding, device)
    options = CudaOptions(context=settings.context, prefetch=False, compile=compile)
    policy = choose_policy(None, source, None, None)
    model: Any = offload_on_gpu(source, float(settings.memory), device, policy, options)
    try:
        yield model
    finally:
        model.expertflow.check_integrity()
        model.expertflow.close()


def generate(model: Any, count: int, **options: Any) -> tuple[Tensor, float]:
    """Greedy tokens, and the seconds that they took."""
    ids = torch.arange(100, 100 + PROMPT, device=DEVICE)[None]
    start = time.perf_counter()
    tokens: Tensor = model.generate(ids, max_new_tokens=count, do_sample=False, **options)
    torch.cuda.synchronize()
    return tokens[0, PROMPT:].cpu(), time.perf_counter() - start


def first_step(settings: CompilingSettings) -> dict[str, Any]:
    """Seconds to the first compiled step, by phase, and the speed after it."""
    captures = []
    warm_up = CapturedStep._warm_up_and_capture

    def timed(step: CapturedStep) -> None:
        start = time.perf_counter()
        warm_up(step)
        captures.append(time.perf_counter() - start)

    CapturedStep._warm_up_and_capture = timed  # type: ignore[method-assign,assignment]
    start = time.perf_counter()
    with loaded(settings, shape_named(settings.shape), True) as model:
        load_s = time.perf_counter() - start
        _, prompt_s = generate(model, 1)
        _, step_s = generate(model, 2)
        names, values = compile_times(repr="csv", aggregate=True)
        seconds = dict(zip(names, [float(str(value)) for value in values], strict=True))
        _, long_s = generate(model, settings.tokens)
    return {
        "load_s": load_s, "prompt_s": prompt_s, "first_step_s": step_s, "capture_s": sum(captures),
        **{f"{phase}_s": seconds.get(name, 0.0) for phase, name in PHASES.items()},
        "tokens_per_s": (settings.tokens - 1) / long_s,
        "caches": dict(counters["aot_autograd"])
        | {k: v for k, v in counters["inductor"].items() if "cache" in k},
    }  # fmt: skip


def auto(settings: CompilingSettings) -> dict[str, Any]:
    """Speed before, while the compiler runs, at and after the switch; and whether tokens agree."""
    with loaded(settings, shape_named(settings.shape), "auto") as model:
        forwards = model.expertflow._backend.decoder.model.forwards
        generate(model, 1)
        first, first_s = generate(model, settings.tokens)
        start, during = time.perf_counter(), []
        while forwards._process is not None and time.perf_counter() - start < LONGEST_WAIT:
            if not forwards._process[1].is_running:
                break
            during.append(generate(model, settings.tokens)[1])
        waited = time.perf_counter() - start
        switched, switch_s = generate(model, settings.tokens)
        after, after_s = generate(model, settings.tokens)
        same = int((first == after).long().cumprod(0).sum())
        count = settings.tokens
        return {
            "first_s": first_s, "waited_s": waited, "failure": forwards.failure,
            "during_tokens_per_s": [round(count / s, 1) for s in during[:3] + during[-3:]],
            "switch_s": switch_s, "after_tokens_per_s": count / after_s,
            "equal_tokens": same, "of": count, "repeatable": bool(torch.equal(switched, after)),
            "caches": dict(counters["aot_autograd"]),
        }  # fmt: skip


class Forced(LogitsProcessor):
    """Keeps the logits of every step, and lets it go on with the given token."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.logits = tokens, [torch.empty(0)] * 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores[0].float().cpu())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[len(self.logits) - 1]] = 0
        return forced


def numbers(settings: CompilingSettings) -> dict[str, Any]:
    """Logits of plain and compiled steps over the same tokens, and one layer's operations."""
    whole = shape_named(settings.shape)
    shape = replace(whole, options=whole.options | {"num_hidden_layers": settings.layers})
    plain = _logits(settings, shape, False)
    found: dict[str, Any] = {"plain again": _differences(_logits(settings, shape, False), plain)}
    for name, options in WAYS.items():
        before = dict(COMPILER)
        COMPILER.update(options)
        torch._dynamo.reset()
        try:
            found[name] = _differences(_logits(settings, shape, True), plain)
            hidden = int(whole.options["hidden_size"])
            found[name]["operations"] = compare(hidden, torch.device(DEVICE), options)
        finally:
            COMPILER.clear()
            COMPILER.update(before)
    return found


def _logits(settings: CompilingSettings, shape: Shape, compile: bool) -> Tensor:
    random = torch.Generator().manual_seed(1)
    vocabulary = int(shape.options["vocab_size"])
    forced = Forced(torch.randint(vocabulary, (settings.tokens,), generator=random).tolist())
    with loaded(settings, shape, compile) as model:
        generate(model, settings.tokens, logits_processor=LogitsProcessorList([forced]))
    return torch.stack(forced.logits)[1:]  # the first is the prompt's


def _differences(found: Tensor, plain: Tensor) -> dict[str, Any]:
    return {
        "largest": float((found - plain).abs().max()),
        "typical": float((found - plain).abs().mean()),
        "scale": float(plain.std()),
        "argmax_agrees": float((found.argmax(-1) == plain.argmax(-1)).float().mean()),
        "rows_equal": float((found == plain).all(-1).float().mean()),
    }
