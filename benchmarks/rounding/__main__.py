"""Lossy encodings of one model, each under several roundings of equal size.

    python -m benchmarks.rounding --model DIR --text FILES --calibration OTHER_FILES

Every conversion runs over the same text as the original: perplexity, KL divergence, agreement of
greedy tokens given the true text. The routes of the last rounding are replayed through caches, with
the predictor of the original where one is given. The last line is JSON.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rounding.settings import EncodingsSettings
from routing.cli import run
from routing.process.cores import wait_passively

if TYPE_CHECKING:
    from benchmarks.rounding.arms import Arm
    from benchmarks.rounding.routes import Replay


def main(settings: EncodingsSettings) -> None:
    """Convert, measure, replay; print tables, then all as JSON."""
    wait_passively()
    import torch
    import transformers

    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, save, settings_json
    from benchmarks.rounding.arms import convert_all, measure
    from benchmarks.rounding.report import print_quality, print_replays

    transformers.utils.logging.set_verbosity_error()
    facts = {
        "machine": machine(torch.device(settings.device)),
        "command": command("benchmarks.rounding"),
        "settings": settings_json(settings),
    }
    print_facts(facts)
    with tempfile.TemporaryDirectory() as folder:
        arms = list(convert_all(settings, Path(folder)))
        qualities = measure(settings, arms, Path(folder) / "routes")
        arms = [replace(arm, quality=q) for arm, q in zip(arms, qualities, strict=True)]
        print_quality(arms)
        replays = _replays(settings, arms, Path(folder) / "routes")
    if replays:
        print_replays(replays)
    rows = [asdict(arm) | {"directory": None, "quality": _json(arm)} for arm in arms]
    result = facts | {"rows": rows, "replays": [asdict(one) for one in replays]}
    save(result, settings.out)
    print(json.dumps(result), flush=True)


def _replays(settings: EncodingsSettings, arms: list[Arm], routes: Path) -> list[Replay]:
    from benchmarks.rounding.arms import ORIGINAL
    from benchmarks.rounding.routes import replay
    from routing.predictor_file.reader import open_predictor

    if settings.replay_documents == 0:
        return []
    predictor = None if settings.predictor is None else open_predictor(settings.predictor)
    names = [ORIGINAL, *(arm.name for arm in arms if arm.rounding == settings.roundings[-1])]
    options: tuple[Any, ...] = (settings.replay_documents, settings.residency, predictor)
    return [replay(name, routes / name, routes / ORIGINAL, *options) for name in names]


def _json(arm: Arm) -> dict[str, Any]:
    assert arm.quality is not None, "every arm is measured"
    return arm.quality._asdict() | {"change": arm.quality.change}


if __name__ == "__main__":
    run(main, EncodingsSettings, prog="python -m benchmarks.rounding")
