"""Kernels of the experts, or of attention, under several tile sizes, on one GPU without a link.

    python -m benchmarks.kernels --shape olmoe-7b
    python -m benchmarks.kernels --shape olmoe-7b --contexts 512 4096 --batches 1 8
    python -m benchmarks.kernels --shape gpt-oss-20b --encodings mxfp4 fp8 --batches 1 8 32

One layer of random experts, all in slots, with random routes. Prompts run the grouped products,
decode batches the kernels of a captured step; every candidate computes the same. Kernels are timed
in CUDA graphs, so launches do not count. GB/s counts each used expert once, TFLOP/s two operations
per weight and token. The last line is JSON. With encodings, all candidates are compiled first, side
by side, and their results are compared with torch's. Attention is that of a captured step's tokens,
each over a full cache, beside torch's with and without cuDNN.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.kernels.report import TimedKernel, print_kernels
from benchmarks.kernels.settings import KernelsSettings
from routing.cli import run


def main(settings: KernelsSettings) -> None:
    """Time all candidates; print the best beside the one in use, then all as JSON."""
    import torch

    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, save, settings_json
    from benchmarks.kernels.attention import AttentionBench
    from benchmarks.kernels.bench import Bench

    device = torch.device(settings.device)
    facts = {
        "machine": machine(device),
        "command": command("benchmarks.kernels"),
        "settings": settings_json(settings),
    }
    print_facts(facts)
    rows = []
    if settings.encodings:
        benches = _coded(settings, device)
    elif settings.contexts:
        benches = iter([("", AttentionBench(settings.shape, device, settings.repeats))])
    else:
        benches = iter([("", Bench(settings.shape, device, settings.repeats))])
    for encoding, bench in benches:
        measured = [row for row in _measured(settings, bench) if row.seconds < math.inf]
        print_kernels(measured, f"Tiles {settings.shape} {encoding}")
        rows += [{"encoding": encoding} | row._asdict() for row in measured]
    result = facts | {"rows": rows}
    save(result, settings.out)
    print(json.dumps(result), flush=True)


def _coded(settings: KernelsSettings, device: Any) -> Iterator[tuple[str, Any]]:
    """A bench for each encoding, whose kernels were found right."""
    import torch

    from benchmarks.common.encodings import ENCODINGS
    from benchmarks.kernels.coded import CodedBench
    from benchmarks.kernels.compiling import compile_ahead

    for name in settings.encodings:
        if name not in ENCODINGS:
            raise ValueError(f"encodings={name!r} is not one of {', '.join(ENCODINGS)}")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        start = time.perf_counter()
        number = compile_ahead(
            settings.shape, settings.encodings, settings.batches, settings.prompts,
            10 * major + minor,
        )  # fmt: skip
        print(f"{number} candidates compiled in {time.perf_counter() - start:.0f} s", flush=True)
    for encoding in settings.encodings:
        bench = CodedBench(settings.shape, encoding, device, settings.repeats)
        for batch in settings.batches:
            bench.check(batch)
        print(f"{settings.shape} {encoding}: right at batches {settings.batches}", flush=True)
        yield encoding, bench


def _measured(settings: KernelsSettings, bench: Any) -> Iterator[TimedKernel]:
    if settings.contexts:
        for context in settings.contexts:
            for batch in settings.batches:
                yield from bench.decode(context, batch)
        return
    for prompt in settings.prompts:
        yield from bench.prefill(prompt)
    for batch in settings.batches:
        yield from bench.decode(batch)


if __name__ == "__main__":
    run(main, KernelsSettings, prog="python -m benchmarks.kernels")
