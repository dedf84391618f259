"""Gain of adapting to a kind of text, by the tokens that it is adapted to.

    python -m benchmarks.adaptation --traces TRACE ... --predictor FILE --replay OLD --out JSON

Each kind's held-out documents are the same for all numbers of tokens. The file is written after
every adaptation.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import command, machine
from exports.adaptation.hit_rates import hit_rates
from exports.adaptation.report import to_json
from predictor.adaptation.candidate import make_candidate
from predictor.adaptation.settings import AdaptationSettings
from routing.cli import run
from routing.shards import write_atomically


@dataclass(frozen=True, kw_only=True)
class GainSettings:
    """Adapt a predictor to kinds of text, with more and more tokens of each."""

    traces: list[Path]
    """A trace for each kind, named after it."""
    predictor: Path
    """ONNX file to start from."""
    replay: list[Path] = field(default_factory=list)
    """Traces of earlier text, to train on beside the new one."""
    tokens: list[int] = field(default_factory=lambda: [10_000, 50_000, 250_000])
    """Tokens to train on."""
    minutes: float = 5.0
    """Train for at most this long each time."""
    max_eval_tokens: int = 6_000
    """Hold out at most about this many tokens to stop by, and as many to judge by."""
    simulated_tokens: int = 1_500
    """Compare hit rates on this many held-out tokens."""
    out: Path
    """JSON file to write."""


def main(settings: GainSettings) -> None:
    """Adapt to every kind with every number of tokens; write all figures."""
    results: list[dict[str, Any]] = []
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for tokens in settings.tokens:
        for trace in settings.traces:
            results.append(
                {"kind": trace.name, "max_tokens": tokens} | gain(settings, trace, tokens)
            )
            _write(settings.out, results)
            print(f"{trace.name}, {tokens:,} tokens: {results[-1]['hit_rates']['new']}", flush=True)


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    document = {
        "machine": machine(torch.device("cpu")),
        "command": command("benchmarks.adaptation"),
        "results": results,
    }
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def gain(settings: GainSettings, trace: Path, tokens: int) -> dict[str, Any]:
    """The figures of one adaptation, as `expertflow adapt --json` writes them."""
    adaptation = AdaptationSettings(
        trace=[trace],
        replay=settings.replay,
        max_tokens=tokens,
        minutes=settings.minutes,
        max_eval_tokens=settings.max_eval_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        candidate = make_candidate(adaptation, settings.predictor, Path(folder))
        parts = {"new": candidate.new, "old": candidate.old}
        rates = {
            name: hit_rates(
                division.held_out,
                candidate.start,
                candidate.path,
                max_tokens=settings.simulated_tokens,
            )
            for name, division in parts.items()
            if division is not None
        }
        return to_json(candidate, rates)


if __name__ == "__main__":
    run(
        main,
        GainSettings,
        prog="python -m benchmarks.adaptation",
        examples=["--traces kinds/el kinds/it_man --predictor p.onnx --replay old --out gain.json"],
    )
