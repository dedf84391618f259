"""The steps and expert calls that the runtime would make of a recorded trace."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from routing.shards import PROMPT, Document, TraceReader, signed_experts
from routing.topology import NO_EXPERT, Topology


class TraceStep(NamedTuple):
    """A forward pass over consecutive tokens of one document."""

    first: bool
    """True at the start of a document."""
    token_ids_T: np.ndarray
    """int64"""
    positions_T: np.ndarray
    """int64"""
    experts_TLK: np.ndarray
    """int16 or int32, NO_EXPERT where there is none."""

    def calls(self) -> Iterator[tuple[int, np.ndarray]]:
        """The expert calls of the step: each layer with its distinct experts, int64 ascending."""
        for layer in range(self.experts_TLK.shape[1]):
            experts = np.unique(self.experts_TLK[:, layer])
            experts = experts[experts != NO_EXPERT]
            if len(experts):
                yield layer, experts.astype(np.int64)


def document_steps(
    document: Document, num_experts: int, *, decode_all: bool
) -> Iterator[TraceStep]:
    """The steps of a document: its prompt in one, then one a token.

    decode_all: take the prompt token by token too.
    """
    num_prompt = int((document.phase_T == PROMPT).sum())
    first = 1 if decode_all or num_prompt == 0 else num_prompt
    experts_TLK = signed_experts(document.experts_TLK, num_experts)
    token_ids_T = document.token_ids_T.astype(np.int64)
    positions_T = np.arange(len(token_ids_T), dtype=np.int64)
    edges = [0, *range(first, len(token_ids_T) + 1)]
    for start, stop in pairwise(edges):
        span = slice(start, stop)
        yield TraceStep(start == 0, token_ids_T[span], positions_T[span], experts_TLK[span])


def trace_calls(
    directory: str | Path, topology: Topology, *, decode_all: bool = False
) -> list[tuple[int, np.ndarray]]:
    """The expert calls of every document of a trace, in order.

    decode_all: take prompts token by token too.

    Raises ValueError if the trace is damaged or of another model.
    """
    reader = TraceReader(directory)
    topology.require_match(reader.topology, ours="the model", theirs=f"the trace {directory}")
    if len(topology.stacks) > 1:
        raise ValueError("replay needs a decoder-only model: traces keep the stacks apart")
    return [
        call
        for document in reader.documents()
        for step in document_steps(document, reader.stack.num_experts, decode_all=decode_all)
        for call in step.calls()
    ]


def sample_documents(
    reader: TraceReader, *, max_tokens: int, document_tokens: int
) -> Iterator[Document]:
    """Documents of every label in turn, cut to `document_tokens` each and `max_tokens` in all."""
    of_label = [np.flatnonzero(reader.doc_labels == label) for label in range(len(reader.labels))]
    turns = zip_longest(*of_label)
    for index in (index for turn in turns for index in turn if index is not None):
        document = reader.document(int(index))
        length = min(len(document.token_ids_T), document_tokens, max_tokens)
        if length == 0:
            return
        max_tokens -= length
        yield Document(
            document.token_ids_T[:length],
            document.experts_TLK[:length],
            document.phase_T[:length],
            document.label,
            lookahead={name: ahead.cut(length) for name, ahead in document.lookahead.items()},
        )
