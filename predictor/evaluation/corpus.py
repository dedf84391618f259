"""Documents to fit baselines on and documents to score on, which are never the same."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from predictor.evaluation.settings import EvaluateSettings
from predictor.file.documents import whole_document
from predictor.networks.windows import Windows
from predictor.training.data import split_of
from routing.shards import PROMPT, TraceReader, signed_experts

VAL_FRACTION, TEST_FRACTION = 0.05, 0.05
"""The default splits of `predictor.training.data`."""


class Corpus:
    """Some documents of a trace; iterating gives each as a batch of one row."""

    def __init__(self, reader: TraceReader, indices: Sequence[int]) -> None:
        self.reader = reader
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Windows]:
        return map(self.batch, self.indices)

    def batch(self, index: int) -> Windows:
        """Document `index` of the trace."""
        document = self.reader.document(index)
        experts_TLK = signed_experts(document.experts_TLK, self.reader.stack.num_experts)
        num_prompt = int((document.phase_T == PROMPT).sum())
        return whole_document(document.token_ids_T, experts_TLK, num_prompt)

    def by_label(self, max_tokens: int) -> Iterator[tuple[str, list[int]]]:
        """The documents in groups of one label and about `max_tokens` tokens, in a fixed order."""
        groups: dict[int, list[int]] = {}
        for index in self.indices:
            groups.setdefault(int(self.reader.doc_labels[index]), []).append(index)
        for label, indices in groups.items():
            part, total = [], 0
            for index in indices:
                part.append(index)
                total += int(self.reader.doc_lengths[index])
                if total >= max_tokens:
                    yield self.reader.labels[label], part
                    part, total = [], 0
            if part:
                yield self.reader.labels[label], part


def corpora(reader: TraceReader, settings: EvaluateSettings) -> tuple[Corpus, Corpus]:
    """The documents to fit the baselines on, and those to score on. Raises ValueError.

    Documents of the trace that `--fit_trace` holds too are not scored on: a warning counts them.
    """
    if settings.fit_trace is not None:
        fit_reader = TraceReader(settings.fit_trace, settings.stack)
        fit_reader.require_token_ids("the token table")
        reader.topology.require_match(
            fit_reader.topology,
            ours=f"the trace {reader.directory}",
            theirs=f"the trace {fit_reader.directory}",
        )
        return (
            some(fit_reader, range(len(fit_reader)), settings.max_fit_tokens),
            some(reader, _held_out(reader, fit_reader), settings.max_tokens),
        )
    splits = [split_of(document, VAL_FRACTION, TEST_FRACTION) for document in reader.documents()]
    train, test = ([i for i, s in enumerate(splits) if s == name] for name in ("train", "test"))
    return some(reader, train, settings.max_fit_tokens), some(reader, test, settings.max_tokens)


def _held_out(reader: TraceReader, fit_reader: TraceReader) -> list[int]:
    """The documents that are not in `fit_reader`. Raises ValueError if there are none."""
    shared = shared_documents(reader, fit_reader)
    if not shared:
        return list(range(len(reader)))
    kept = [index for index in range(len(reader)) if index not in shared]
    if not kept:
        raise ValueError(
            f"every document of {reader.directory} is in {fit_reader.directory} (--fit_trace) too: "
            "figures on them would not be held out; trace other documents, or leave --fit_trace "
            "out to split one trace"
        )
    warnings.warn(
        f"{len(shared):,} of the {len(reader):,} documents of {reader.directory} are in "
        f"{fit_reader.directory} (--fit_trace) too: they are left out of the figures",
        stacklevel=2,
    )
    return kept


def shared_documents(reader: TraceReader, other: TraceReader) -> set[int]:
    """Documents of `reader` whose tokens are those of a document of `other`.

    Where one trace cut its documents shorter than the other, as many tokens are compared as the
    longest document of that trace has.
    """
    if not (len(reader) and len(other)):
        return set()
    longest = int(min(reader.doc_lengths.max(), other.doc_lengths.max()))
    known = {_digest(document.token_ids_T[:longest]) for document in other.documents()}
    return {
        index
        for index, document in enumerate(reader.documents())
        if len(document.token_ids_T) and _digest(document.token_ids_T[:longest]) in known
    }


def _digest(token_ids_T: np.ndarray) -> bytes:
    tokens = np.ascontiguousarray(token_ids_T, np.int32)
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def some(reader: TraceReader, indices: Sequence[int], max_tokens: int) -> Corpus:
    """Documents picked at random until they have `max_tokens` tokens. Raises ValueError."""
    if not indices:
        raise ValueError(
            f"the {len(reader)} document(s) of {reader.directory} are too few to fit on some and "
            "score on others; name another trace to fit on with --fit_trace, or trace more"
        )
    order = np.random.default_rng(0).permutation(np.asarray(indices))
    ends = np.cumsum(reader.doc_lengths[order])
    return Corpus(reader, order[: int(np.searchsorted(ends, max_tokens)) + 1].tolist())
