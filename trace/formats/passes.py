"""Forward passes put together as sequences, for traces that record layer by layer.

Such traces do not say which sequence a token belongs to. So they must be of one sequence at a time:
a pass over several tokens is a prompt, and begins a document unless the pass before was of a prompt
too; a pass over one token continues it.

T tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from routing.topology import NO_EXPERT, Stack
from trace.formats.document import ForeignDocument, layer_columns


class Pass(NamedTuple):
    """One forward pass: for each layer of the file, by its number, the experts [T, K]."""

    layers: Mapping[int, np.ndarray]
    where: str
    prompt: bool | None = None
    """None where the format does not say."""


def sequences(
    passes: Iterable[Pass], stack: Stack, *, each: bool = False
) -> Iterator[ForeignDocument]:
    """The documents that the passes make up. Raises ValueError for layers that are missing.

    each: every pass is a document, as in training.
    """
    parts: list[np.ndarray] = []
    num_prompt, where = 0, ""
    for one in passes:
        experts_TLK = _experts(one, stack)
        is_prompt = len(experts_TLK) > 1 if one.prompt is None else one.prompt
        so_far = sum(map(len, parts))
        begins = each or not parts or (is_prompt and so_far > num_prompt)
        if begins and parts:
            yield ForeignDocument(np.concatenate(parts), None, num_prompt, where)
        if begins:
            parts, num_prompt, where, so_far = [], 0, one.where, 0
        if is_prompt or (one.prompt is None and not so_far):
            num_prompt = so_far + len(experts_TLK)
        parts.append(experts_TLK)
    if parts:
        yield ForeignDocument(np.concatenate(parts), None, num_prompt, where)


def _experts(one: Pass, stack: Stack) -> np.ndarray:
    """[T, L, K]; NO_EXPERT for tokens that the last layer left out.

    llama.cpp computes the last layer of a prompt for those tokens alone whose output is wanted.
    """
    numbers = sorted(one.layers)
    columns = layer_columns(numbers, stack, one.where)
    chosen = [one.layers[numbers[column]] for column in columns]
    for layer, experts_TK in zip(stack.layers, chosen, strict=True):
        if experts_TK.ndim != 2 or experts_TK.shape[1] != stack.top_k:
            raise ValueError(
                f"{one.where}: {experts_TK.shape[-1]} experts a token in {layer.name}, but the "
                f"model uses {stack.top_k}"
            )
    lengths = [len(experts_TK) for experts_TK in chosen]
    longest = max(lengths)
    if set(lengths[:-1]) - {longest}:
        short = next(i for i, length in enumerate(lengths) if length < longest)
        raise ValueError(
            f"{one.where}: {lengths[short]} tokens in {stack.layers[short].name}, but {longest} in "
            "other layers"
        )
    experts_TLK = np.full((longest, stack.num_layers, stack.top_k), NO_EXPERT, np.int64)
    for index, experts_TK in enumerate(chosen):
        experts_TLK[longest - len(experts_TK) :, index] = experts_TK
    return experts_TLK
