"""Replay a trace through every cache policy: `python -m runtime.simulate --trace DIR`.

python -m runtime.simulate --trace DIR --predictor predictor.onnx --plot hits.png
python -m runtime.simulate --trace DIR --all --fit_trace OTHER --predictor predictor.onnx
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from routing.cli import run
from routing.names import print_whole
from routing.shards import GENERATED, Document, TraceReader
from runtime.simulation.settings import SimulateSettings
from runtime.simulation.trace_steps import document_steps, sample_documents

if TYPE_CHECKING:
    from routing.predictor_file.reader import PredictorFile


def main(settings: SimulateSettings) -> None:
    """Simulate, print the results, and write the files that were asked for."""
    from routing.predictor_file.reader import open_predictor

    reader = TraceReader(settings.trace)
    predictor = None if settings.predictor is None else open_predictor(settings.predictor)
    if predictor is not None:
        reader.require_token_ids(f"the predictor {settings.predictor}")
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
        reader.require_token_ids("the token table of --all")
        _compare_all(settings, reader, documents)
    else:
        _replay(settings, reader, documents, predictor)


def _replay(
    settings: SimulateSettings,
    reader: TraceReader,
    documents: list[Document],
    predictor: PredictorFile | None,
) -> None:
    """Hit rates of every policy at every cache size."""
    from runtime.simulation.contenders import fit_calls
    from runtime.simulation.hit_rates import plot, table, write_json
    from runtime.simulation.replay import simulate

    decode_all = settings.decode_all or not any((d.phase_T == GENERATED).any() for d in documents)
    num_experts = reader.stack.num_experts
    steps = [
        step
        for document in documents
        for step in document_steps(document, num_experts, decode_all=decode_all)
    ]
    shape = reader.stack.num_layers, num_experts
    results = simulate(
        steps,
        shape,
        residency=settings.residency,
        predictor=predictor,
        fit=None if settings.fit_trace is None else fit_calls(settings, reader),
    )
    title = _title(reader, documents)
    print_whole(table(results, title))
    if settings.json is not None:
        write_json(settings.json, settings, [asdict(result) for result in results])
    if settings.plot is not None:
        plot(settings.plot, results, title)


def _compare_all(
    settings: SimulateSettings, reader: TraceReader, documents: list[Document]
) -> None:
    """Every predictor and baseline, with prefetching on a modelled link."""
    from runtime.simulation.hit_rates import plot_contenders, write_json
    from runtime.simulation.report import as_json, compare

    results, remarks = compare(settings, reader, documents)
    print("\n".join(remarks))
    if settings.json is not None:
        write_json(settings.json, settings, as_json(results))
    if settings.plot is not None:
        plot_contenders(settings.plot, results, _title(reader, documents))


def _title(reader: TraceReader, documents: list[Document]) -> str:
    num_tokens = sum(len(document.token_ids_T) for document in documents)
    return f"{num_tokens} tokens of {len(documents)} documents, {reader.topology.model_type}"


def _documents(reader: TraceReader, settings: SimulateSettings) -> list[Document]:
    """The documents to replay. Raises ValueError for a trace without any."""
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


if __name__ == "__main__":
    run(
        main,
        SimulateSettings,
        prog="python -m runtime.simulate",
        examples=[
            "--trace trace --predictor predictor.onnx --plot hits.png",
            "--trace held-out --predictor predictor.onnx --all --fit-trace trace",
        ],
    )
