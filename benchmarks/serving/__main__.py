"""Many requests at once on a CPU, under several schedulers: bytes, time and latency.

    python -m benchmarks.serving --model DIR --predictor predictor.onnx --text FOLDER

Prompts of all domains in random order, with outputs of varied length, are served with equal expert
slots, equal decode batch and equal prompt chunk. Scheduler, predictor and prefill all count.
Every arm must generate the same tokens. An arm is SCHEDULER, or SCHEDULER,KEY=VALUE,... with a
`policy`, a share of `extra` experts, or fields of `ServeSettings`. Requests arrive all at once, or
as a Poisson process of `--rate` requests a second. The arms run side by side, a step each in turn,
on one thread; times are CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.serving.arm import ServingArm
from benchmarks.serving.run import ServingRun
from benchmarks.serving.settings import ServingSettings
from routing.cli import run

if TYPE_CHECKING:
    from runtime.serving.request import Request


def main(settings: ServingSettings) -> None:
    """Run every arm, print the table; a JSON line for each arm goes to stderr and to `out`."""
    import torch
    import transformers

    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts
    from benchmarks.serving.report import print_cpu_table
    from benchmarks.serving.text_requests import text_requests

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    facts = {
        "machine": machine(torch.device("cpu")),
        "command": command("benchmarks.serving"),
        "model": settings.model.name,
        "rate": settings.rate,
        "batch": settings.batch,
    }
    print_facts(facts)
    requests = text_requests(settings)
    rows: list[dict[str, Any]] = []
    for residency in settings.residency:
        runs = [load(settings, requests, ServingArm.parse(arm), residency) for arm in settings.arms]
        while unfinished := [one for one in runs if not one.is_done]:
            for one in unfinished:
                one.step()
        for one in runs:
            rows.append(one.measure() | {"identical": one.tokens == runs[0].tokens})
            _keep(settings, facts | rows[-1])
    print_cpu_table(settings, rows)


def load(
    settings: ServingSettings, requests: Sequence[Request], arm: ServingArm, residency: float
) -> ServingRun:
    """An arm with its own copy of the model, timed in CPU seconds.

    The arms take turns, a step each, so all meet the same load from other programs; and a CPU
    second is the same whatever else runs on the processor.
    """
    import runtime

    engine = runtime.load(
        settings.model,
        settings.predictor if arm.policy == "predicted" else None,
        memory=residency + arm.extra,
        policy=arm.policy,
        dtype=settings.dtype,
        device="cpu",
    ).expertflow
    return ServingRun(
        engine, requests, arm, residency, settings.serve_settings(arm), rate=settings.rate,
        seed=settings.seed, now=time.process_time,
    )  # fmt: skip


def _keep(settings: ServingSettings, row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr)
    if settings.out is not None:
        with settings.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    run(main, ServingSettings, prog="python -m benchmarks.serving")
