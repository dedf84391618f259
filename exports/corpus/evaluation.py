"""Evaluation text: held-out pieces of every kind, in a folder whose labels tell the kind's role.

`evaluation/ROLE/KIND.txt` becomes the label `ROLE/KIND` in a trace collected from the folder, so
that every table by label tells kinds that something was trained on from `held_out` ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from exports.corpus.documents import pieces
from exports.corpus.domains import Domain
from exports.corpus.folder import SEPARATOR
from exports.token_stream import read_documents

KIND_BYTES = 60_000
"""Most text of a kind: some thousand tokens of any tokenizer, and more documents than a few."""
PIECE = 7_000
"""Characters of a piece: one file is not all that is measured of its kind."""


def write_evaluation(out: Path, text: Path, domains: Iterable[Domain]) -> None:
    """Write the held-out text of `domains`, which lies in `text`, by role and kind."""
    for domain in domains:
        documents = read_documents(text / "val" / f"{domain.name}.txt")
        path = out / domain.role / f"{domain.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = (part + SEPARATOR for part in _up_to(KIND_BYTES, first_pieces(documents)))
        path.write_text("".join(parts), encoding="utf-8", newline="\n")


def first_pieces(documents: Sequence[str]) -> Iterator[str]:
    """The first piece of each document, then the second pieces, and so on."""
    rounds = zip_longest(*(pieces(document, PIECE) for document in documents))
    return (piece for piece in chain.from_iterable(rounds) if piece and piece.strip())


def _up_to(limit: int, parts: Iterable[str]) -> Iterator[str]:
    """Parts until they have `limit` bytes, at least one."""
    size = 0
    for part in parts:
        yield part
        size += len(part.encode())
        if size >= limit:
            return
