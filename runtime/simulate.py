"""Replay a trace through every cache policy: `python -m runtime.simulate --trace DIR`.

python -m runtime.simulate --trace DIR --predictor predictor.onnx --plot hits.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routing.cli import run
from routing.shards import GENERATED, Document, TraceReader
from runtime.simulation.trace_steps import document_steps, sample_documents

if TYPE_CHECKING:
    from runtime.simulation.replay import ReplayResult

COLORS = {
    "lru": "#8c8c8c",
    "lfu": "#3b6ea5",
    "predicted": "#d9822b",
    "belady": "#4f8a5b",
    "predicted+bypass": "#e8b98a",
    "belady+bypass": "#a5c9a9",
}


@dataclass(frozen=True, kw_only=True)
class SimulateSettings:
    """Replay a trace through every cache policy at several cache sizes."""

    trace: Path
    """Trace directory, of a decoder-only model."""
    predictor: Path | None = None
    """ONNX predictor; adds the predicted-reuse policy."""
    residency: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 0.75])
    """Cache sizes, as fractions of all experts."""
    max_tokens: int = 10_000
    """Tokens to replay in all, taken from every label in turn."""
    document_tokens: int = 512
    """Tokens to replay of one document at the most."""
    decode_all: bool = False
    """Replay prompts token by token too (always so where a trace has no generated tokens)."""
    json: Path | None = None
    """Write the results to this JSON file."""
    plot: Path | None = None
    """Draw hit rates over cache sizes into this picture file."""
    all: bool = False
    """Compare every way to predict as well, with prefetching on a modelled link."""
    fit_trace: Path | None = None
    """With --all: trace to fit the predictors on that need no training."""
    fit_tokens: int = 50_000
    """With --all: tokens of it to fit on."""
    more_predictors: list[Path] = field(default_factory=list)
    """With --all: further ONNX predictors, say the paper's."""
    expert_mb: float = 12.6
    """With --all: size of an expert, in MB."""
    link_gb_s: float = 55.0
    """With --all: bandwidth of the link that experts cross, in GB/s."""
    layer_ms: float = 0.2
    """With --all: time to compute a layer whose experts are at hand."""

    def __post_init__(self) -> None:
        bad = [share for share in self.residency if not 0 < share <= 1]
        if bad or not self.residency:
            raise ValueError(f"residency {bad or 'without a value'}: give fractions in (0, 1]")
        if self.all and self.fit_trace is None:
            raise ValueError("--all needs --fit_trace, a trace to fit the simple predictors on")

    def predictors(self) -> list[Path]:
        """All ONNX files."""
        return [*filter(None, [self.predictor]), *self.more_predictors]


def main(settings: SimulateSettings) -> None:
    """Simulate, print the table, and write what was asked for."""
    from rich.console import Console

    from routing.predictor_file.reader import open_predictor
    from runtime.simulation.replay import simulate

    reader = TraceReader(settings.trace)
    predictor = None if settings.predictor is None else open_predictor(settings.predictor)
    if predictor is not None:
        reader.topology.require_match(
            predictor.topology,
            ours=f"the trace {settings.trace}",
            theirs=f"the predictor {settings.predictor}",
        )
    if len(reader.topology.stacks) > 1:
        raise ValueError(
            f"{settings.trace} is of an encoder-decoder model: only decoders are simulated"
        )
    documents = _documents(reader, settings)
    if settings.all:
        _compare_all(settings, reader, documents)
        return
    decode_all = settings.decode_all or not any((d.phase_T == GENERATED).any() for d in documents)
    num_experts = reader.stack.num_experts
    steps = [
        step
        for document in documents
        for step in document_steps(document, num_experts, decode_all=decode_all)
    ]
    shape = reader.stack.num_layers, num_experts
    results = simulate(steps, shape, residency=settings.residency, predictor=predictor)
    num_tokens = sum(len(document.token_ids_T) for document in documents)
    title = f"{num_tokens} tokens of {len(documents)} documents, {reader.topology.model_type}"
    Console().print(_table(results, title))
    if settings.json is not None:
        _write_json(settings.json, settings, [asdict(result) for result in results])
    if settings.plot is not None:
        _plot(settings.plot, results, title)


def _compare_all(
    settings: SimulateSettings, reader: TraceReader, documents: list[Document]
) -> None:
    from runtime.simulation.report import as_json, compare

    outcomes, remarks = compare(settings, reader, documents)
    print("\n".join(remarks))
    if settings.json is not None:
        _write_json(settings.json, settings, as_json(outcomes))


def _documents(reader: TraceReader, settings: SimulateSettings) -> list[Document]:
    documents = list(
        sample_documents(
            reader,
            max_tokens=settings.max_tokens,
            document_tokens=settings.document_tokens,
        )
    )
    if not documents:
        raise ValueError(f"the trace {settings.trace} holds no documents")
    return documents


def _by_policy(results: Sequence[ReplayResult]) -> dict[str, list[ReplayResult]]:
    policies = dict.fromkeys(result.policy for result in results)
    return {name: [r for r in results if r.policy == name] for name in policies}


def _table(results: Sequence[ReplayResult], title: str) -> object:
    from rich.table import Table

    table = Table(
        "policy",
        title=f"hit rate by share of experts resident\n{title}",
        title_justify="left",
    )
    for share in dict.fromkeys(result.residency for result in results):
        table.add_column(f"{share * 100:.4g} %", justify="right")
    for policy, row in _by_policy(results).items():
        table.add_row(policy, *(f"{r.hit_rate:.3f}" for r in row))
    return table


def _write_json(path: Path, settings: SimulateSettings, results: Sequence[dict[str, Any]]) -> None:
    document = {
        "command": ["python", "-m", "runtime.simulate", *sys.argv[1:]],
        "settings": {key: str(value) for key, value in asdict(settings).items()},
        "results": list(results),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _plot(path: Path, results: Sequence[ReplayResult], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for policy, row in _by_policy(results).items():
        row = sorted(row, key=lambda result: result.residency)
        axes.plot(
            [result.residency for result in row],
            [result.hit_rate for result in row],
            marker="o",
            label=policy,
            color=COLORS[policy],
            linestyle="--" if policy.startswith("belady") or "+" in policy else "-",
        )
    axes.set(xlabel="share of all experts resident", ylabel="hit rate", ylim=(0, 1))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run(main, SimulateSettings, prog="python -m runtime.simulate")
