"""Decoding speed of experts in codes of 4 and 8 bits, at equal GPU memory.

    python -m benchmarks.encodings --shapes olmoe-7b --trace DIR --predictor predictor.onnx

The models have published shapes, and experts of random codes. Routes are replayed from a trace of
the same topology, or drawn with a stated locality. Logits are compared between all residencies of
an encoding. Rows are printed as they come, and as a table at the end; JSON goes to the file of
--out after every arm, or is printed before the table.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.encodings.settings import EncodingSettings
from routing.cli import run

if TYPE_CHECKING:
    from benchmarks.systems.row import Row


def main(settings: EncodingSettings) -> None:
    """Run every arm, and print the table."""
    import torch
    import transformers

    from benchmarks.common.machine import command, machine
    from benchmarks.common.report import print_facts, save, settings_json
    from benchmarks.encodings.arms import encoding_arms
    from benchmarks.encodings.report import print_rows
    from benchmarks.encodings.runner import EncodingRunner
    from benchmarks.encodings.subject import CodedSubject

    transformers.utils.logging.set_verbosity_error()
    device = torch.device(settings.device)
    subject = CodedSubject(
        device, trace=settings.trace, predictor=settings.predictor, seed=settings.seed
    )
    traced, predicted = (of(settings.shapes) for of in (subject.traced, subject.predicted))
    arms = encoding_arms(settings, traced, predicted)
    title = f"encodings, prompt {settings.prompt}, {settings.tokens} new tokens"
    facts: dict[str, Any] = {
        "title": title,
        "machine": machine(device),
        "command": command("benchmarks.encodings"),
        "link_bytes_per_s": subject.link,
        "settings": settings_json(settings),
    }
    print_facts(facts)

    def results(rows: list[Row]) -> dict[str, Any]:
        return facts | {"rows": [row.to_json() for row in rows]}

    runner = EncodingRunner(settings, subject)
    rows = runner.run_all(arms, lambda rows: save(results(rows), settings.out))
    if settings.out is None:
        print(json.dumps(results(rows)), flush=True)
    print_rows(rows, title)


if __name__ == "__main__":
    run(main, EncodingSettings, prog="python -m benchmarks.encodings")
