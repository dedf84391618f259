"""The documents to fit on and those to compare on, apart.

Within one trace the split is by document: of each label the first half is compared on and the
second is fitted on. A label's only document is cut in its middle: its beginning is fitted on, and
its rest compared on. Documents that are compared on are never fitted on, wherever they come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from routing.shards import Document, TraceReader, signed_experts
from routing.trace_format.extras import Extras
from routing.writer import TraceWriter
from runtime.comparison.settings import CompareSettings


class Split(NamedTuple):
    """A trace to compare on, and one to fit on."""

    compared: TraceReader
    fit: TraceReader
    remarks: list[str]
    """Whatever of the split a reader of the figures should know."""


@contextmanager
def split_trace(reader: TraceReader, settings: CompareSettings) -> Iterator[Split]:
    """The two parts as traces of their own, which are gone after the context.

    Raises ValueError where nothing is left to compare on or to fit on.
    """
    by_label, remarks = _by_label(reader), []
    if settings.fit_trace is None:
        source = reader
        halves = [_halves(documents) for documents in by_label]
        compared, others = [half[0] for half in halves], [half[1] for half in halves]
        if lone := [documents[0].label for documents in by_label if len(documents) == 1]:
            remarks.append(
                f"one document each, cut in two: {', '.join(lone)}; what was fitted on saw the "
                "beginning of the text that it is compared on"
            )
    else:
        source = _fit_reader(reader, settings.fit_trace)
        compared, others = by_label, _by_label(source)
    chosen = list(_in_turn(compared, settings.document_tokens, settings.max_tokens))
    taken = {digest([document], reader) for document in chosen}
    cut = list(_in_turn(others, settings.document_tokens, settings.fit_tokens))
    fit = [document for document in cut if digest([document], source) not in taken]
    if len(fit) < len(cut):
        remarks.append(f"{len(cut) - len(fit)} documents are compared on, and so not fitted on")
    _require(chosen, fit, settings)
    with TemporaryDirectory() as name:
        yield Split(
            _written(Path(name) / "compared", reader, chosen),
            _written(Path(name) / "fit", source, fit),
            remarks,
        )


def _fit_reader(reader: TraceReader, path: Path) -> TraceReader:
    fit = TraceReader(path)
    reader.topology.require_match(
        fit.topology, ours=f"the trace {reader.directory}", theirs=f"the trace {path}"
    )
    return fit


def _require(
    chosen: Sequence[Document], fit: Sequence[Document], settings: CompareSettings
) -> None:
    if not chosen:
        raise ValueError(f"the trace {settings.trace} holds no documents to compare on")
    if not any(len(document.token_ids_T) > 1 for document in fit):
        raise ValueError(
            f"the trace {settings.fit_trace or settings.trace} leaves no text to fit the baselines "
            "on: give --fit-trace, a trace of other documents"
        )


def _by_label(reader: TraceReader) -> list[list[Document]]:
    found: list[list[Document]] = [[] for _ in reader.labels]
    for number, label in enumerate(reader.doc_labels.tolist()):
        if reader.doc_lengths[number]:
            found[label].append(reader.document(number))
    return [documents for documents in found if documents]


def _halves(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Those to compare on, and those to fit on."""
    if len(documents) > 1:
        half = -(-len(documents) // 2)
        return documents[:half], documents[half:]
    (document,) = documents
    middle = len(document.token_ids_T) // 2
    return [_part(document, slice(middle, None))], [_part(document, slice(0, middle))]


def _part(document: Document, span: slice) -> Document:
    return Document(
        document.token_ids_T[span],
        document.experts_TLK[span],
        document.phase_T[span],
        document.label,
        lookahead={
            name: type(ahead)(*(values[span] for values in ahead))
            for name, ahead in document.lookahead.items()
        },
    )


def _in_turn(by_label: Sequence[Sequence[Document]], most: int, total: int) -> Iterator[Document]:
    """Documents of every label in turn: `most` tokens of each, and equal shares of `total`.

    Of a label's only document as many are taken as are the label's share.
    """
    left = [-(-total // max(len(by_label), 1))] * len(by_label)
    for turn in zip_longest(*by_label):
        for label, document in enumerate(turn):
            limit = left[label] if len(by_label[label]) == 1 else min(most, left[label])
            if document is not None and limit:
                part = _part(document, slice(0, limit))
                left[label] -= len(part.token_ids_T)
                if len(part.token_ids_T):
                    yield part


def _written(path: Path, source: TraceReader, documents: Iterable[Document]) -> TraceReader:
    extras = Extras(token_ids=source.extras.token_ids)
    with TraceWriter(
        path, source.topology, provenance={}, lookahead=source.lookahead, extras=extras
    ) as writer:
        for document in documents:
            writer.add({"decoder": document})
    return TraceReader(path, verify=False)


def digest(documents: Iterable[Document], reader: TraceReader) -> str:
    """A hash of the documents' routes: the same in whatever format they were recorded.

    Formats differ in the order of a token's experts, and in whether they have token ids.
    """
    found = hashlib.sha256()
    for document in documents:
        experts_TLK = signed_experts(document.experts_TLK, reader.stack.num_experts)
        ordered = np.sort(experts_TLK, axis=-1).astype("<i4")
        found.update(np.array(ordered.shape, "<i8").tobytes() + ordered.tobytes())
    return found.hexdigest()
