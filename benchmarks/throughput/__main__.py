"""Throughput of hundreds of sequences, beside what the link allows.

    python -m benchmarks.throughput --trace DIR [--arms 'bf16 0.25 x384' ...] [--out FILE]

The model has a published shape and random weights; requests are passages of a trace of the same
topology, whose tokens and routes are replayed. All requests are there from the beginning. tok/s are
new tokens over all the time from the first step to the last, prompts included.
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
    from benchmarks.throughput.arm import ThroughputArm
    from benchmarks.throughput.page import by_arm
    from benchmarks.throughput.runner import run_arm

    transformers.utils.logging.set_verbosity_error()
    start, device = time.perf_counter(), torch.device(settings.device)
    arms = [ThroughputArm.parse(name) for name in settings.arms]
    link = measure_link(4 << 20, device)
    facts: dict[str, Any] = {
        "title": f"{settings.shape}, {settings.tokens} new tokens a request",
        "machine": machine(device),
        "command": command("benchmarks.throughput"),
        "link_bytes_per_s": link,
        "settings": settings_json(settings),
    }
    print_facts(facts)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        if time.perf_counter() - start > settings.budget_seconds:
            rows.append({"arm": arm.name, "error": "skipped: the time budget was spent"})
        else:
            try:
                rows.append(run_arm(settings, shape_named(settings.shape), arm, best(link)))
            except Exception as error:  # one arm of many: the others still count
                text = " ".join(str(error).split())
                rows.append({"arm": arm.name, "error": f"{type(error).__name__}: {text:.300}"})
            free_memory()
        print(json.dumps(rows[-1]), flush=True)
        save(facts | {"rows": rows}, settings.out)
    print("\n".join(by_arm(rows)))


if __name__ == "__main__":
    run(main, ThroughputSettings, prog="python -m benchmarks.throughput")
