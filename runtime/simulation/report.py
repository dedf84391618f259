"""`python -m runtime.simulate --all`: fits the rivals, compares all, prints, says what prefetching
is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from routing.names import told_apart
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.shards import Document, TraceReader
from runtime.simulation.baselines import fit_rivals
from runtime.simulation.comparison import (
    Contender,
    Outcome,
    decode_steps,
    file_forecasts,
    other_replays,
    outcome,
    predicting,
    rival_forecasts,
    without_forecast,
)
from runtime.simulation.link_model import Machine
from runtime.simulation.lookahead_contenders import (
    Sample,
    ahead_contenders,
    unpredicted,
    with_recall_ahead,
)
from runtime.simulation.settings import SimulateSettings
from runtime.simulation.trace_steps import document_steps, sample_documents

COLUMNS = (
    "",
    "this",
    "next",
    "hits",
    "MB/token",
    "ms/token",
    "priced",
    "greedy",
    "useful MB",
    "wasted MB",
    "timely",
)
WORTH_IT = 0.005
"""Share of a token's time below which prefetching stays off: it also costs what is not modelled."""


def compare(
    settings: SimulateSettings, reader: TraceReader, documents: Sequence[Document]
) -> tuple[list[Outcome], list[str]]:
    """Run everything and print a table for each cache size. Also returns the closing remarks.

    Raises ValueError for a trace or predictor of another model.
    """
    shape = reader.stack.num_layers, reader.stack.num_experts
    sample = _sample(documents, shape[1])
    contenders = list(_contenders(settings, reader, sample, shape))
    calls = [list(step.calls()) for step in decode_steps(sample.steps)]
    machine = Machine(expert_ms=settings.expert_mb / settings.link_gb_s, layer_ms=settings.layer_ms)
    outcomes, remarks = [], []
    for share in settings.residency:
        rows = [outcome(contender, calls, shape, share, machine) for contender in contenders]
        print_table(rows, other_replays(calls, shape, share), settings, share)
        remarks += [remark(row) for row in rows if row.saving is not None]
        outcomes += rows
    print_recall_ahead(contenders)
    return outcomes, remarks


def _sample(documents: Sequence[Document], num_experts: int) -> Sample:
    steps = [list(document_steps(d, num_experts, decode_all=True)) for d in documents]
    return Sample(documents, steps)


def _contenders(
    settings: SimulateSettings,
    reader: TraceReader,
    sample: Sample,
    shape: tuple[int, int],
) -> Iterator[Contender]:
    steps = decode_steps(sample.steps)
    yield from without_forecast(shape, [c for step in steps for c in step.calls()], len(steps))
    yield unpredicted(reader.stack, len(steps))
    fit, sources = _fit_sample(settings, reader)
    paths = settings.predictors()
    names = told_apart(paths, lambda path: path.stem)
    files = {name: _opened(path, reader) for name, path in zip(names, paths, strict=True)}
    horizon = next(iter(files.values())).horizon if files else 4
    for rival in fit_rivals(fit.steps, shape[1], horizon):
        forecasts = list(rival_forecasts(rival, sample.steps, shape[1]))
        yield predicting(rival.name, forecasts, sample.steps, shape, horizon)
    of_files, used_TLE = {}, sample.used(shape[1])
    for name, file in files.items():
        forecasts = list(file_forecasts(file, sample.steps))
        plain = predicting(name, forecasts, sample.steps, shape, file.horizon)
        depth = max((reader.lookahead[source] for source in sources), default=0)
        of_files[name] = file, with_recall_ahead(plain, used_TLE, depth)
        yield of_files[name][1]
    yield from ahead_contenders(sources, reader.stack, sample, fit, of_files)


def _opened(path: Path, reader: TraceReader) -> PredictorFile:
    file = open_predictor(path)
    reader.topology.require_match(
        file.topology, ours=f"the trace {reader.directory}", theirs=f"the predictor {path}"
    )
    return file


def _fit_sample(settings: SimulateSettings, reader: TraceReader) -> tuple[Sample, list[str]]:
    """Documents to fit on, and the look-aheads that they and the trace both hold."""
    assert settings.fit_trace is not None
    fit = TraceReader(settings.fit_trace)
    reader.topology.require_match(
        fit.topology,
        ours=f"the trace {reader.directory}",
        theirs=f"the trace {settings.fit_trace}",
    )
    chosen = sample_documents(
        fit, max_tokens=settings.fit_tokens, document_tokens=settings.document_tokens
    )
    sources = [name for name in reader.lookahead if name in fit.lookahead]
    if missing := sorted(reader.lookahead.keys() - fit.lookahead.keys()):
        print(f"without look-ahead by {', '.join(missing)}: {fit.directory} does not hold it")
    return _sample(list(chosen), fit.stack.num_experts), sources


def print_table(
    rows: Sequence[Outcome],
    others: Sequence[tuple[str, float]],
    settings: SimulateSettings,
    share: float,
) -> None:
    """One cache size: a row for each contender."""
    from rich.console import Console
    from rich.table import Table

    machine = (
        f"{settings.expert_mb:g} MB an expert, {settings.link_gb_s:g} GB/s, "
        f"{settings.layer_ms:g} ms a layer"
    )
    table = Table(title=f"{share:.4g} of all experts resident; {machine}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*_cells(row, settings.expert_mb))
    for name, hit_rate in others:
        table.add_row(name, "", "", f"{hit_rate:.3f}")
    Console(width=120).print(table)


def _cells(row: Outcome, expert_mb: float) -> list[str]:
    def number(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    has_plan = row.saving is not None
    useful = row.timely + row.late
    return [
        row.name,
        number(row.recall_this),
        number(row.recall_next),
        number(row.hit_rate),
        number(row.loads_per_token * expert_mb, 0),
        *(number(row.ms_per_token.get(plan), 2) for plan in ("none", "priced", "greedy")),
        number(useful * expert_mb if has_plan else None, 1),
        number(row.wasted * expert_mb if has_plan else None, 1),
        number(row.timely / useful if useful else None, 2),
    ]


def print_recall_ahead(contenders: Sequence[Contender]) -> None:
    """How well each contender knows, at a layer, the experts of the layers 1, 2 ... further on."""
    from rich.console import Console
    from rich.table import Table

    depth = max(len(contender.recall_ahead) for contender in contenders)
    rows = [contender for contender in contenders if depth and contender.recall_ahead]
    table = Table("layers ahead")
    for distance in range(1, depth + 1):
        table.add_column(str(distance), justify="right")
    for row in rows:
        table.add_row(row.name, *(f"{value:.3f}" for value in row.recall_ahead))
    if rows:
        print("recall of the experts of a coming layer")
        Console(width=120).print(table)


def remark(row: Outcome) -> str:
    """The verdict on prefetching by one contender's forecasts."""
    assert row.saving is not None
    verdict = "on" if row.saving >= WORTH_IT else "off"
    return (
        f"{row.name} at {row.residency:.4g}: prefetch {verdict}, the priced plan changes a token's "
        f"time by {-row.saving:+.1%}"
    )


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [vars(row) | {"saving": row.saving} for row in outcomes]
