"""Time to the first token of an offloaded model, over prompt lengths, against its bounds.

    python -m benchmarks.prefill --shape olmoe-7b --trace DIR

The bounds are the link (bytes of missing experts / measured bandwidth) and the computation alone
(the same prompt with every expert resident, in the same run). A prefill that overlaps both
perfectly takes the larger. Beside them stand the lanes of one prompt of each of ExpertFlow's arms
(link, CPU, GPU) and the bound that they set (benchmarks/lanes/bound.py). Model, text and routes are
as in `benchmarks.decode`. The last line is JSON.
"""

from __future__ import annotations

import json

from benchmarks.prefill.settings import PrefillSettings
from routing.cli import run


def main(settings: PrefillSettings) -> None:
    """Run every arm at every length, print the table, then the same as JSON."""
    import torch
    import transformers

    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, require_matplotlib, save, settings_json
    from benchmarks.lanes.page import print_lanes
    from benchmarks.prefill.arms import prefill_arms
    from benchmarks.prefill.report import print_rows
    from benchmarks.prefill.runner import PrefillRunner
    from benchmarks.systems.subject import Subject

    transformers.utils.logging.set_verbosity_error()
    require_matplotlib(settings.plots)
    arms, device = prefill_arms(settings), torch.device(settings.device)
    subject = Subject(
        settings.shape, device, trace=settings.trace, predictor=None, seed=settings.seed
    )
    title = f"{settings.shape}, prefill, batch {settings.batch}, routes {subject.facts['routes']}"
    facts = {
        "title": title,
        "machine": machine(device),
        "command": command("benchmarks.prefill"),
        "model": subject.facts,
    }
    print_facts(facts)
    runner = PrefillRunner(settings, subject)
    rows = runner.run_all(arms)
    print_rows(rows, title)
    print_lanes(rows, title)
    result = facts | {
        "settings": settings_json(settings),
        "rows": [row.to_json() for row in rows],
        "lanes": runner.lanes,
    }
    if settings.plots is not None:
        from benchmarks.prefill.plot import draw

        draw(result, settings.plots)
    save(result, settings.out)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run(main, PrefillSettings, prog="python -m benchmarks.prefill")
