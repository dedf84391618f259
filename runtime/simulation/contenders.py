"""The contenders of `python -m runtime.simulate --all`, fitted, opened and calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from routing.names import told_apart
from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.shards import Document, TraceReader
from runtime.cache.belady import Call
from runtime.simulation.baselines import fit_baselines
from runtime.simulation.comparison import (
    Contender,
    baseline_forecasts,
    decode_steps,
    file_forecasts,
    predicting,
    without_forecast,
)
from runtime.simulation.lookahead_contenders import (
    Sample,
    ahead_contenders,
    unpredicted,
    with_recall_ahead,
)
from runtime.simulation.settings import SimulateSettings
from runtime.simulation.trace_steps import document_steps, sample_documents


def decoded(documents: Sequence[Document], num_experts: int) -> Sample:
    """Documents with their decode steps, prompts too taken token by token."""
    steps = [list(document_steps(d, num_experts, decode_all=True)) for d in documents]
    return Sample(documents, steps)


def all_contenders(
    settings: SimulateSettings,
    reader: TraceReader,
    sample: Sample,
    shape: tuple[int, int],
) -> Iterator[Contender]:
    """Every policy, baseline, predictor and look-ahead that can run on the sample. shape: (L, E).

    The order is that of the rows in the report. Raises ValueError for a predictor, or a trace to
    fit on, of another model.
    """
    steps = decode_steps(sample.steps)
    fit, fit_reader = _fit_sample(settings, reader)
    sources = _shared_sources(reader, fit_reader)
    counted = [call for step in decode_steps(fit.steps) for call in step.calls()]
    calls = [call for step in steps for call in step.calls()]
    yield from without_forecast(shape, calls, counted, len(steps))
    yield unpredicted(reader.stack, len(steps))
    paths = settings.predictors()
    names = told_apart(paths, lambda path: path.stem)
    files = {name: _open(path, reader) for name, path in zip(names, paths, strict=True)}
    horizon = next(iter(files.values())).horizon if files else 4
    for baseline in fit_baselines(fit.steps, shape[1], horizon):
        forecasts = list(baseline_forecasts(baseline, sample.steps, shape[1]))
        yield predicting(baseline.name, forecasts, sample.steps, shape, horizon)
    of_files, used_TLE = {}, sample.used(shape[1])
    for name, file in files.items():
        forecasts = list(file_forecasts(file, sample.steps))
        plain = predicting(name, forecasts, sample.steps, shape, file.horizon)
        depth = max((reader.lookahead[source] for source in sources), default=0)
        of_files[name] = file, with_recall_ahead(plain, used_TLE, depth)
        yield of_files[name][1]
    yield from ahead_contenders(sources, reader.stack, sample, fit, of_files)


def _open(path: Path, reader: TraceReader) -> PredictorFile:
    """Open a predictor, which must be of the model of the trace."""
    file = open_predictor(path)
    reader.topology.require_match(
        file.topology, ours=f"the trace {reader.directory}", theirs=f"the predictor {path}"
    )
    return file


def fit_calls(settings: SimulateSettings, reader: TraceReader) -> list[Call]:
    """The expert calls of the documents to fit on, in order.

    Raises ValueError where that trace is of another model.
    """
    steps = decode_steps(_fit_sample(settings, reader)[0].steps)
    return [call for step in steps for call in step.calls()]


def _fit_sample(settings: SimulateSettings, reader: TraceReader) -> tuple[Sample, TraceReader]:
    """The documents to fit on, and the trace that holds them."""
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
    return decoded(list(chosen), fit.stack.num_experts), fit


def _shared_sources(reader: TraceReader, fit: TraceReader) -> list[str]:
    """The look-aheads that both traces hold."""
    if missing := sorted(reader.lookahead.keys() - fit.lookahead.keys()):
        print(f"without look-ahead by {', '.join(missing)}: {fit.directory} does not hold it")
    return [name for name in reader.lookahead if name in fit.lookahead]
