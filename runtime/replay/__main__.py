"""A recorded run as one HTML file: `python -m runtime.replay TRACE --out page.html`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from routing.cli import run
from runtime.replay.settings import ReplaySettings

if TYPE_CHECKING:
    from routing.predictor_file.reader import PredictorFile
    from routing.shards import Document, TraceReader


def write_page(settings: ReplaySettings) -> None:
    """Replay a document and write its page.

    Raises ValueError for a trace, a document or a predictor that cannot be replayed.
    """
    from routing.shards import TraceReader
    from routing.trace_format.manifest import write_atomically
    from runtime.replay.bundle import html_page
    from runtime.replay.model_files import find_model_files
    from runtime.replay.page_data import page_data
    from runtime.replay.recording import record

    reader = TraceReader(settings.trace)
    if len(reader.topology.stacks) > 1:
        raise ValueError(
            f"{settings.trace} is of an encoder-decoder model: only decoders are replayed"
        )
    document = _document(reader, settings)
    recording = record(
        reader,
        document,
        policy=settings.policy,
        residency=settings.residency,
        predictor=_predictor(reader, settings),
        decode_all=settings.decode_all,
    )
    files = find_model_files(reader, settings)
    page = html_page(page_data(reader, recording, files, settings.document)).encode()
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings.out, page)
    whole = int(reader.doc_lengths[settings.document])
    if len(document.token_ids_T) < whole:
        print(
            f"the first {len(document.token_ids_T):,} of {whole:,} tokens of document "
            f"{settings.document} are shown: --max_tokens shows more"
        )
    if files.remark:
        print(files.remark)
    print(f"page: {settings.out} ({len(page) / 1000:,.0f} kB)")


def _document(reader: TraceReader, settings: ReplaySettings) -> Document:
    """The document, cut to `--max_tokens`."""
    if not len(reader):
        raise ValueError(f"the trace {settings.trace} holds no documents")
    if not 0 <= settings.document < len(reader):
        raise ValueError(
            f"--document {settings.document}: the trace {settings.trace} holds documents 0 to "
            f"{len(reader) - 1}"
        )
    whole, span = reader.document(settings.document), slice(settings.max_tokens)
    if not len(whole.token_ids_T):
        raise ValueError(f"document {settings.document} of {settings.trace} is empty")
    return whole._replace(
        token_ids_T=whole.token_ids_T[span],
        experts_TLK=whole.experts_TLK[span],
        phase_T=whole.phase_T[span],
    )


def _predictor(reader: TraceReader, settings: ReplaySettings) -> PredictorFile | None:
    from routing.predictor_file.reader import open_predictor

    if settings.predictor is None:
        return None
    predictor = open_predictor(settings.predictor)
    reader.require_token_ids(f"the predictor {settings.predictor}")
    reader.topology.require_match(
        predictor.topology,
        ours=f"the trace {settings.trace}",
        theirs=f"the predictor {settings.predictor}",
    )
    return predictor


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. The trace comes first, without `--trace`."""
    run(
        write_page,
        ReplaySettings,
        argv,
        prog="python -m runtime.replay",
        positional=["trace"],
        examples=[
            "trace --out page.html --predictor predictor.onnx",
            "trace --out page.html --document 7 --policy belady --residency 0.125",
        ],
    )


if __name__ == "__main__":
    main()
