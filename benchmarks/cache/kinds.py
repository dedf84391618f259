"""Every cache rule on a trace, kind of text by kind of text.

    python -m benchmarks.cache.kinds --trace DIR --fit_trace OTHER --json kinds.json
    python -m benchmarks.cache.kinds --model DIR --text FOLDER --predictor FILE --json live.json
    python -m benchmarks.cache.kinds --json kinds.json      # its tables once more
    python -m benchmarks.cache.kinds --json kinds.json --parts one.json other.json    # joined

Kinds are the trace's labels, or the names of the text files. Each starts with an empty cache, which
its documents share; prompts are decoded token by token. With --model the policies run live, and
what cannot is simulated (`live_kinds`). Hit rates do not depend on the machine. The tables are
Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cache.live_kinds import LiveKindsSettings, live_kinds
from benchmarks.cache.page import agreeing, by_kind
from routing.cli import run

if TYPE_CHECKING:
    from routing.predictor_file.reader import PredictorFile
    from routing.shards import TraceReader
    from runtime.cache.belady import Calls
    from runtime.simulation.replay import ReplayResult

KEYS = ("commands", "rows")
KEPT = ("policy", "residency", "slots", "requests", "loads")


@dataclass(frozen=True, kw_only=True)
class KindsSettings(LiveKindsSettings):
    """Compare every cache rule on each kind of text: simulated on a trace, or live in a model."""

    json: Path
    """File to write the results to; without --trace and --model, to read them from."""
    trace: Path | None = None
    """Trace directory of a decoder-only model, with labels."""
    parts: list[Path] = field(default_factory=list)
    """Files of runs over other kinds or sizes of the same model, to join in --json."""

    def __post_init__(self) -> None:
        if self.trace is not None and self.model is not None:
            raise ValueError("give --trace to simulate or --model to run live, not both")


def main(settings: KindsSettings) -> None:
    """Run where there is a trace or a model, or join the parts, then print the tables."""
    if settings.trace is not None or settings.model is not None:
        from benchmarks.common.machine import command

        rows: list[dict[str, Any]] = []
        for results in _results(settings) if settings.model is None else live_kinds(settings):
            rows += results
            write(settings.json, [command("benchmarks.cache.kinds")], rows)
    elif settings.parts:
        parts = [json.loads(path.read_text()) for path in settings.parts]
        write(settings.json, *([one for part in parts for one in part[key]] for key in KEYS))
    rows = json.loads(settings.json.read_text())["rows"]
    for share in dict.fromkeys(row["residency"] for row in rows):
        print(f"\n{share:.4g} of the experts resident\n")
        print("\n".join(by_kind([row for row in rows if row["residency"] == share])))
    if live := [row for row in rows if row.get("live")]:
        print(f"\n{agreement(live)}")


def write(path: Path, commands: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write the commands and the rows that they gave, a row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"commands": {json.dumps(list(commands))}, "rows": [\n{lines}\n]}}\n')


def _results(settings: KindsSettings) -> Iterator[list[dict[str, Any]]]:
    """The results of each kind, by policy and cache size."""
    from routing.predictor_file.reader import open_predictor
    from routing.shards import TraceReader
    from runtime.simulation.trace_steps import trace_calls

    assert settings.trace is not None
    reader = TraceReader(settings.trace)
    file = None if settings.predictor is None else open_predictor(settings.predictor)
    if file is not None:
        names = {"ours": f"the trace {settings.trace}", "theirs": f"{settings.predictor}"}
        reader.topology.require_match(file.topology, **names)
    fit = settings.fit_trace and trace_calls(settings.fit_trace, reader.topology, decode_all=True)
    if unknown := sorted(set(settings.kinds) - set(reader.labels)):
        raise ValueError(f"{settings.trace} has no documents of the kind {', '.join(unknown)}")
    for kind in settings.kinds or reader.labels:
        label = reader.labels.index(kind)
        results = _replay(settings, reader, label, file, fit or None)
        yield [
            {"kind": kind} | {name: getattr(result, name) for name in KEPT} for result in results
        ]


def _replay(
    settings: KindsSettings,
    reader: TraceReader,
    label: int,
    file: PredictorFile | None,
    fit: Calls | None,
) -> Sequence[ReplayResult]:
    """All rules on the documents of one kind."""
    import numpy as np

    from runtime.simulation.replay import simulate
    from runtime.simulation.trace_steps import document_steps

    num_experts = reader.stack.num_experts
    documents = (reader.document(int(i)) for i in np.flatnonzero(reader.doc_labels == label))
    steps = [
        step
        for document in documents
        for step in document_steps(document, num_experts, decode_all=True)
    ]
    shape = reader.stack.num_layers, num_experts
    sizes = settings.residency
    return simulate(steps[: settings.kind_tokens], shape, residency=sizes, predictor=file, fit=fit)


def agreement(live: Sequence[dict[str, Any]]) -> str:
    """A sentence about live rows: how far they are from their simulation, and their tokens."""
    apart = [abs(row["loads"] - row["simulated_loads"]) / row["requests"] for row in live]
    loads, tokens = agreeing(live)
    return (
        f"{loads} of {len(live)} live runs load exactly what their simulation loads, the "
        f"others differ by at most {max(apart):.4f} of hit rate; the tokens of {tokens} are those "
        "of the model without offloading."
    )


if __name__ == "__main__":
    run(main, KindsSettings, prog="python -m benchmarks.cache.kinds")
