"""Requests cut out of a trace: their prompts, outputs and routes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from routing.shards import TraceReader, signed_experts
from runtime.serving.request import Request


class Recorded(NamedTuple):
    """A request's tokens and their routes."""

    token_ids_T: np.ndarray
    """Prompt and output."""
    experts_TLK: np.ndarray
    """int16; NO_EXPERT where a token has no expert."""


def recorded_requests(
    trace: Path, count: int, *, prompt_tokens: list[int], output_tokens: list[int], seed: int
) -> tuple[list[Request], dict[str, Recorded]]:
    """`count` requests in random order, labelled by domain, and what was recorded of each, by id.

    prompt_tokens, output_tokens: fewest and most. Raises ValueError if the trace is too short.
    """
    random, reader = np.random.default_rng(seed), TraceReader(trace)
    longest = prompt_tokens[1] + output_tokens[1]
    requests: list[Request] = []
    recorded: dict[str, Recorded] = {}
    for index, start in islice(_spots(reader, longest), count):
        prompt, new = (int(random.integers(a, b + 1)) for a, b in (prompt_tokens, output_tokens))
        document, span = reader.document(index), slice(start, start + prompt + new)
        tokens_T = document.token_ids_T[span]
        experts_TLK = signed_experts(document.experts_TLK[span], reader.stack.num_experts)
        id = str(len(requests))
        recorded[id] = Recorded(tokens_T, experts_TLK)
        requests.append(
            Request(
                id=id,
                prompt=tokens_T[:prompt].tolist(),
                label=document.label,
                ignore_eos=True,
                max_tokens=new,
            )
        )
    if len(requests) < count:
        raise ValueError(f"{trace} has {len(requests)} passages of {longest} tokens, not {count}")
    return [requests[i] for i in random.permutation(count)], recorded


def num_passages(trace: Path, num_tokens: int) -> int:
    """Passages of so many tokens that a trace has."""
    return sum(1 for _ in _spots(TraceReader(trace), num_tokens))


def _spots(reader: TraceReader, longest: int) -> Iterator[tuple[int, int]]:
    """(document, first token) of passages: every document's beginning, then the parts after it."""
    for start in range(0, int(reader.doc_lengths.max(initial=0)), longest):
        for index in np.flatnonzero(reader.doc_lengths >= start + longest).tolist():
            yield index, start
