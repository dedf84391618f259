"""Decoding speed of an offloaded model against what else a user could run, in one run.

    python -m benchmarks.decode --shape olmoe-7b --trace DIR --predictor predictor.onnx

The model has the shape of a published one and random weights (made on the device). Its routes are
its own router's, or replayed from a trace of the same topology. Every arm is fed the same tokens;
the router, the predictor and all bookkeeping run in every step and count. Rows are printed as they
come; the last line is JSON. See docs/results/ for what came out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from routing.cli import run

if TYPE_CHECKING:
    from benchmarks.arms import Row


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """Compare ways to decode with a model whose experts do not fit."""

    shape: str = "olmoe-7b"
    """Model shape: olmoe-7b, qwen3-30b-a3b, mixtral-8x7b or, for a rehearsal, tiny."""
    trace: Path | None = None
    """Trace directory of the same topology, to take text and routes from. Default: random tokens,
    routed by the random router."""
    routes: Literal["model", "even"] = "model"
    """Without a trace: those of the random router, which hardly change from token to token, or
    drawn evenly, the hardest for a cache."""
    predictor: Path | None = None
    """ONNX predictor of the model that was traced."""
    systems: list[str] = field(
        default_factory=lambda: [
            "float32", "transformers", "expertflow", "accelerate", "policylang", "compiled"
        ]
    )  # fmt: skip
    """What to run: float32 (transformers in float32, for the error of the others' logits),
    transformers (all resident), compiled (transformers' static cache and
    compilation), accelerate (experts on the CPU), policylang (moe-policylang), expertflow."""
    residency: list[str] = field(default_factory=lambda: ["1.0", "0.25", "0.5", "0.125", "min"])
    """Shares of the experts' bytes in GPU memory. `min` is one layer's top-k; `6.28%` is a share of
    the whole model's bytes, for all GPU memory together; `2GiB` is such bytes."""
    policies: list[str] = field(default_factory=lambda: ["predicted", "lru", "lfu", "belady"])
    """Cache policies; the first that has what it needs (predicted a predictor, belady a trace) is
    the one that batches and prefetching are measured with."""
    only: list[str] = field(default_factory=list)
    """Run only the arms of these names, as the table prints them."""
    compare_at: str = "0.25"
    """The residency at which prefetching, batches and moe-policylang are measured."""
    batches: list[int] = field(default_factory=lambda: [8, 32])
    """Further numbers of sequences that decode together."""
    prompt: int = 32
    """Tokens of a prompt."""
    tokens: int = 128
    """Tokens to generate after it."""
    documents: int = 3
    """Prompts, one after the other, of batch 1; larger batches have one."""
    check_steps: int = 32
    """Steps whose logits are compared between the arms."""
    arm_seconds: float = 30.0
    """No further prompt begins after so much time of an arm, and none decodes for longer."""
    slow_seconds: float = 10.0
    """Decoding time of accelerate and moe-policylang, which take seconds a token."""
    budget_seconds: float = 300.0
    """No arm begins after so much time; arms come in order of importance."""
    device: str = "cuda"
    """Where the model computes. On the CPU only the arms that can run."""
    seed: int = 0
    """Of the weights."""
    out: Path | None = None
    """File for the JSON."""
    plots: Path | None = None
    """Folder for the pictures."""


def main(settings: DecodeSettings) -> None:
    """Run every arm, print the table, then the same as JSON."""
    import torch
    import transformers

    from benchmarks.decoding import Decoding
    from benchmarks.draw import draw_decode
    from benchmarks.machine import command, machine
    from benchmarks.plan import decode_arms, usable_policies
    from benchmarks.report import (
        print_facts,
        print_rows,
        ratios,
        require_matplotlib,
        save,
        settings_json,
    )
    from benchmarks.subject import Subject

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
    decoding = Decoding(settings, subject)

    def results(rows: list[Row]) -> dict[str, Any]:
        return facts | {
            "rows": [row.to_json() for row in rows],
            "timelines": decoding.timelines,
        }

    rows = decoding.run_all(arms, lambda rows: save(results(rows), settings.out))
    print_rows(rows, title)
    leading = usable_policies(settings)[0]
    facts["ratios"] = ratios(rows, leading, settings.compare_at)
    print(f"{leading} at {settings.compare_at}: {facts['ratios']}")
    result = results(rows)
    if settings.plots is not None:
        draw_decode(result, settings.plots)
    save(result, settings.out)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run(main, DecodeSettings, prog="python -m benchmarks.decode")
