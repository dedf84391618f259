"""Throughput of hundreds of sequences, beside what the machine allows, and other systems.

    python -m benchmarks.throughput --trace DIR [--arms 'bf16 0.25 x384' ...] [--out FILE]
    python -m benchmarks.throughput --shape qwen3-30b-a3b --arms 'bf16 24GiB xauto'

The model has a published shape and random weights; requests are passages of a trace of the same
topology, whose tokens and routes are replayed, or random tokens with drawn routes. All requests are
there from the beginning. tok/s are new tokens over all the time from the first step to the last,
prompts included.
"""

from __future__ import annotations

import json
import time
from typing import Any

from benchmarks.throughput.settings import ThroughputSettings
from routing.cli import run


def main(settings: ThroughputSettings) -> None:
    """Run every arm, print each, then a table."""
    import torch
    import transformers

    from benchmarks.common.link import best, measure_link
    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, save, settings_json
    from benchmarks.common.shapes import shape_named
    from benchmarks.systems.placement import free_memory
    from benchmarks.throughput.arm import OWN, ThroughputArm
    from benchmarks.throughput.bounds import measure_machine
    from benchmarks.throughput.page import by_arm
    from benchmarks.throughput.requests import load_of
    from benchmarks.throughput.rivals import run_rival
    from benchmarks.throughput.runner import run_arm

    transformers.utils.logging.set_verbosity_error()
    start, device = time.perf_counter(), torch.device(settings.device)
    arms = [ThroughputArm.parse(name) for name in settings.arms]
    shape = shape_named(settings.shape)
    load = load_of(settings, shape)
    link = measure_link(4 << 20, device)
    speeds = measure_machine(best(link), device)
    free_memory()
    facts: dict[str, Any] = {
        "title": f"{settings.shape}, {settings.tokens} new tokens a request",
        "machine": machine(device),
        "command": command("benchmarks.throughput"),
        "routes": load.routes,
        "link_bytes_per_s": link,
        "memory_bytes_per_s": speeds.memory,
        "flops": speeds.flops,
        "settings": settings_json(settings),
    }
    print_facts(facts)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        if time.perf_counter() - start > settings.budget_seconds:
            rows.append({"arm": arm.name, "error": "skipped: the time budget was spent"})
        else:
            try:
                rows.append(
                    run_arm(settings, shape, load, arm, speeds)
                    if arm.system == OWN
                    else run_rival(settings, shape, load, arm)
                )
            except Exception as error:  # one arm of many: the others still count
                text = " ".join(str(error).split())
                rows.append({"arm": arm.name, "error": f"{type(error).__name__}: {text:.300}"})
            free_memory()
        print(json.dumps(rows[-1]), flush=True)
        save(facts | {"rows": rows}, settings.out)
    print("\n".join(by_arm(rows)))


if __name__ == "__main__":
    run(main, ThroughputSettings, prog="python -m benchmarks.throughput")
