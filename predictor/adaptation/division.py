"""The division of recorded documents into those trained on and two held-out parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from predictor.training.rows import Documents
from routing.shards import TraceReader


class Division(NamedTuple):
    """Documents of some traces, in three parts without a text in common."""

    train: Documents
    stopping: Documents
    """Say when to stop, and calibrate."""
    held_out: Documents
    """Decide whether the result is kept; nothing else ever looks at them."""

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each part, by its name."""
        return {name: int(part.lengths.sum()) for name, part in self._asdict().items()}


def divide(
    readers: Sequence[TraceReader], *, share: float, most_tokens: int, max_tokens: int | None = None
) -> Division:
    """Divide the documents by a hash of their tokens; equal texts stay together.

    Raises ValueError where there are fewer than three texts.

    Args:
        readers: The traces.
        share: Share of the tokens in each held-out part.
        most_tokens: Tokens in each held-out part, about, where the share would be more.
        max_tokens: Train on about this many tokens and leave the others out; all by default.
    """
    texts = _texts(readers)
    if len(texts) < 3:
        raise ValueError(
            f"the trace holds {len(texts)} different document(s), and adapting needs three: one to "
            "train on, one to say when to stop and one to judge the result; record more"
        )
    lengths = [
        sum(int(readers[reader].doc_lengths[index]) for reader, index in text) for text in texts
    ]
    wanted = min(share * sum(lengths), most_tokens)
    ends = np.cumsum(lengths)
    first = min(int(np.searchsorted(ends, wanted)) + 1, len(texts) - 2)
    second = min(int(np.searchsorted(ends, ends[first - 1] + wanted)) + 1, len(texts) - 1)
    last = len(texts)
    if max_tokens is not None:
        last = int(np.searchsorted(ends, ends[second - 1] + max_tokens)) + 1
    parts = texts[second:last], texts[first:second], texts[:first]
    return Division(*(Documents(readers, [one for text in part for one in text]) for part in parts))


def _texts(readers: Sequence[TraceReader]) -> list[list[tuple[int, int]]]:
    """The documents with tokens, as (trace, document in it); equal ones together, by their hash."""
    found: dict[bytes, list[tuple[int, int]]] = {}
    for number, reader in enumerate(readers):
        for index, document in enumerate(reader.documents()):
            if len(document.token_ids_T):
                ids = np.ascontiguousarray(document.token_ids_T, np.int32)
                digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
                found.setdefault(digest, []).append((number, index))
    return [found[digest] for digest in sorted(found)]
