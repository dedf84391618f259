"""Time to the first token of an offloaded model, over prompt lengths, against what bounds it.

    python -m benchmarks.prefill --shape olmoe-7b --trace DIR

The bounds are the link (bytes of the experts that were missing / measured bandwidth) and the
computation alone (the same prompt with every expert resident, in the same run): a prefill that
overlaps both perfectly takes the larger. Model, text and routes are as in benchmarks.decode. The
last line is JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from routing.cli import run


@dataclass(frozen=True, kw_only=True)
class PrefillSettings:
    """Measure prefill with a model whose experts do not fit."""

    shape: str = "olmoe-7b"
    """Model shape: olmoe-7b, qwen3-30b-a3b, mixtral-8x7b or, for a rehearsal, tiny."""
    trace: Path | None = None
    """Trace directory of the same topology, to take text and routes from. Default: random tokens,
    routed by the random router."""
    systems: list[str] = field(default_factory=lambda: ["expertflow", "transformers", "accelerate"])
    """What to run: expertflow, transformers (all resident), accelerate (experts on the CPU)."""
    residency: list[str] = field(default_factory=lambda: ["0.25", "min"])
    """Shares of the experts in GPU memory, as in benchmarks.decode; `1.0` always runs first."""
    prompts: list[int] = field(default_factory=lambda: [128, 512, 2048])
    """Prompt lengths, in tokens."""
    batch: int = 1
    """Prompts that run together."""
    repeats: int = 5
    """Different prompts of each length, after one that is not counted."""
    budget_seconds: float = 200.0
    """No arm begins after so much time."""
    device: str = "cuda"
    """Where the model computes. On the CPU only the arms that can run."""
    seed: int = 0
    """Of the weights."""
    out: Path | None = None
    """File for the JSON."""
    plots: Path | None = None
    """Folder for the picture."""


def main(settings: PrefillSettings) -> None:
    """Run every arm at every length, print the table, then the same as JSON."""
    import torch
    import transformers

    from benchmarks.draw import draw_prefill
    from benchmarks.machine import command, machine
    from benchmarks.plan import prefill_arms
    from benchmarks.prefilling import Prefilling, print_rows
    from benchmarks.report import print_facts, require_matplotlib, save, settings_json
    from benchmarks.subject import Subject

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
    prefilling = Prefilling(settings, subject)
    rows = [row for arm in arms for row in prefilling.run(arm)]
    print_rows(rows, title)
    result = facts | {
        "settings": settings_json(settings),
        "rows": [row.to_json() for row in rows],
    }
    if settings.plots is not None:
        draw_prefill(result, settings.plots)
    save(result, settings.out)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run(main, PrefillSettings, prog="python -m benchmarks.prefill")
