"""Decoding speed of an offloaded model beside the other systems that a user could run.

    python -m benchmarks.decode --shape olmoe-7b --trace DIR --predictor predictor.onnx

The model has a published shape and random weights, drawn on the device. Its routes are its own
router's, or are replayed from a trace of the same topology. Every arm is fed the same tokens; the
routers, the predictor and all bookkeeping run in every step and count. Rows are printed as they
come, then the lanes of a step of each of ExpertFlow's arms (link, CPU, GPU) and their bounds; the
last line is JSON. Results are in docs/results/.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.decode.settings import DecodeSettings
from routing.cli import run

if TYPE_CHECKING:
    from benchmarks.systems.row import Row


def main(settings: DecodeSettings) -> None:
    """Run every arm, print the table, then the same as JSON."""
    import torch
    import transformers

    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, require_matplotlib, save, settings_json
    from benchmarks.decode.arms import decode_arms, usable_policies
    from benchmarks.decode.report import print_rows, ratios
    from benchmarks.decode.runner import DecodeRunner
    from benchmarks.lanes.page import print_lanes
    from benchmarks.systems.subject import Subject

    transformers.utils.logging.set_verbosity_error()
    require_matplotlib(settings.plots)
    arms, device = decode_arms(settings), torch.device(settings.device)
    subject = Subject(
        settings.shape,
        device,
        trace=settings.trace,
        predictor=settings.predictor,
        routes=settings.routes,
        seed=settings.seed,
    )
    title = (
        f"{settings.shape}, prompt {settings.prompt}, {settings.tokens} new tokens, "
        f"routes {subject.facts['routes']}"
    )
    facts = {
        "title": title,
        "machine": machine(device),
        "command": command("benchmarks.decode"),
        "model": subject.facts,
        "settings": settings_json(settings),
    }
    print_facts(facts)
    runner = DecodeRunner(settings, subject)

    def results(rows: list[Row]) -> dict[str, Any]:
        return facts | {
            "rows": [row.to_json() for row in rows],
            "lanes": runner.lanes,
        }

    rows = runner.run_all(arms, lambda rows: save(results(rows), settings.out))
    print_rows(rows, title)
    print_lanes(rows, title)
    leading = usable_policies(settings)[0]
    facts["ratios"] = ratios(rows, leading, settings.compare_at)
    print(f"{leading} at {settings.compare_at}: {facts['ratios']}")
    result = results(rows)
    if settings.plots is not None:
        from benchmarks.decode.plot import draw

        draw(result, settings.plots)
    save(result, settings.out)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run(main, DecodeSettings, prog="python -m benchmarks.decode")
