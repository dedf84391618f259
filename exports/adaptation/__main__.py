"""Adapt a predictor to recorded routes: `expertflow adapt --trace DIR --out adapted.onnx`.

Documents are held out to say when to stop, and others to judge the result: a file that would be no
better than its start is not written.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from exports.adaptation.settings import AdaptSettings
from routing.cli import run
from routing.process.cores import wait_passively
from routing.process.output_lock import OutputLock

if TYPE_CHECKING:
    from predictor.adaptation.candidate import Candidate
    from predictor.adaptation.fine_tuning import Progress

SHIPPED = Path(__file__).parents[1] / "predictors"


def main(settings: AdaptSettings) -> None:
    """Train, judge, report, and write the file if it became better. Raises ValueError."""
    wait_passively()
    from exports.adaptation.hit_rates import hit_rates
    from exports.adaptation.report import print_report, to_json
    from predictor.adaptation.candidate import make_candidate
    from routing.shards import write_atomically

    start = settings.predictor or _shipped(settings.trace[0])
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"adapting {start}", flush=True)
    with (
        OutputLock(settings.out),
        tempfile.TemporaryDirectory(dir=settings.out.parent, prefix=".adapt-") as scratch,
    ):
        candidate = make_candidate(settings, start, Path(scratch), _print_look)
        rates = {
            name: hit_rates(
                division.held_out, start, candidate.path, max_tokens=settings.simulated_tokens
            )
            for name, division in (("new", candidate.new), ("old", candidate.old))
            if division is not None
        }
        print_report(candidate, rates)
        if settings.json is not None:
            settings.json.parent.mkdir(parents=True, exist_ok=True)
            report = json.dumps(to_json(candidate, rates), indent=1) + "\n"
            write_atomically(settings.json, report.encode())
        _keep(candidate, settings.out)


def _keep(candidate: Candidate, out: Path) -> None:
    before, after = (candidate.judged(x) for x in (candidate.before, candidate.after))
    if not candidate.is_better:
        raise ValueError(
            f"adapting brought nothing: the held-out loss is {after:.4f}, and {before:.4f} without "
            f"it; {out} is not written; go on with {candidate.start}, or record more text"
        )
    os.replace(candidate.path, out)
    print(f"wrote {out}: the held-out loss fell from {before:.4f} to {after:.4f}")


def _print_look(look: Progress) -> None:
    print(f"step {look.step:5}  {look.seconds:6.0f} s  loss {look.loss:.4f}", flush=True)


def _shipped(trace: Path) -> Path:
    """The predictor that ships for the trace's model. Raises ValueError where there is none."""
    from routing.predictor_file.reader import open_predictor
    from routing.shards import TraceReader

    topology = TraceReader(trace).topology
    for path in sorted(SHIPPED.glob("*.onnx")):
        if open_predictor(path, num_threads=1).topology == topology:
            return path
    raise ValueError(
        f"no predictor ships for the model of {trace} ({topology}); name the file to start from "
        "with --predictor"
    )


if __name__ == "__main__":
    run(
        main,
        AdaptSettings,
        prog="python -m exports.adaptation",
        first=["trace", "predictor", "out", "replay", "minutes"],
        examples=[
            "--trace recorded --predictor predictor.onnx --out adapted.onnx",
            "--trace recorded --replay trace --out adapted.onnx --minutes 3 --json adapted.json",
        ],
    )
