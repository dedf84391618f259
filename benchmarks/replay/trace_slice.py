"""A small slice of a trace, to carry to another machine: beginnings of documents of every label.

python -m benchmarks.replay.trace_slice --trace DIR --out DIR [--documents 36] [--tokens 300]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from routing.cli import run
from routing.shards import Document, TraceReader
from routing.writer import TraceWriter


@dataclass(frozen=True, kw_only=True)
class SliceSettings:
    """Cut a small trace out of a large one."""

    trace: Path
    """Trace directory to cut from; its decoder stack."""
    out: Path
    """New trace directory."""
    documents: int = 36
    """Documents to keep, of every label in turn."""
    tokens: int = 300
    """Tokens to keep of a document; shorter documents are left out."""


def main(settings: SliceSettings) -> None:
    """Write the slice. Its provenance is the trace's, with a note of how it was cut."""
    reader = TraceReader(settings.trace)
    chosen = choose(reader, settings.documents, settings.tokens)
    provenance = reader.provenance | {
        "slice": f"{len(chosen)} documents of at least {settings.tokens} tokens, their beginnings"
    }
    with TraceWriter(settings.out, reader.topology, provenance=provenance) as writer:
        for index in chosen:
            writer.add({reader.stack.name: beginning(reader.document(index), settings.tokens)})
    print(f"{settings.out}: {len(chosen)} documents of {settings.tokens} tokens")


def choose(reader: TraceReader, documents: int, tokens: int) -> list[int]:
    """Indices of documents of at least `tokens` tokens, of every label in turn.

    Raises ValueError if there are too few.
    """
    long = reader.doc_lengths >= tokens
    of_label = [
        np.flatnonzero(long & (reader.doc_labels == label)).tolist()
        for label in range(len(reader.labels))
    ]
    turns = [i for i in chain(*zip_longest(*of_label)) if i is not None]
    if len(turns) < documents:
        raise ValueError(
            f"{reader.directory} has {len(turns)} documents of {tokens} tokens, not {documents}"
        )
    return turns[:documents]


def beginning(document: Document, tokens: int) -> Document:
    """The first `tokens` tokens of a document."""
    return Document(
        document.token_ids_T[:tokens],
        document.experts_TLK[:tokens],
        document.phase_T[:tokens],
        document.label,
    )


if __name__ == "__main__":
    run(main, SliceSettings, prog="python -m benchmarks.replay.trace_slice")
