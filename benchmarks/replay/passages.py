"""Passages: the text that every arm generates, with recorded or drawn routes if there are any."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from routing.shards import TraceReader, signed_experts
from routing.topology import Stack


class Passages(NamedTuple):
    """B sequences of T tokens that run together."""

    token_ids_BT: Tensor
    """int64, on the CPU"""
    experts_BTLK: np.ndarray | None
    """int64 routes of these tokens; None where the model's own router decides."""

    def first(self, num_tokens: int) -> Passages:
        """The first `num_tokens` tokens of each sequence."""
        experts = self.experts_BTLK
        return Passages(
            self.token_ids_BT[:, :num_tokens], None if experts is None else experts[:, :num_tokens]
        )


class TracedText:
    """Passages from a trace directory: documents in order, joined where one is too short."""

    routes = "replayed from a trace"

    def __init__(self, directory: str | Path, stack: Stack, vocab_size: int) -> None:
        """Raises ValueError if the trace's layers, experts or vocabulary do not fit the model's."""
        self._reader = TraceReader(directory)
        model, traced = (_sizes(s) for s in (stack, self._reader.stack))
        if model != traced or self._reader.topology.vocab_size > vocab_size:
            raise ValueError(
                f"the trace {directory} is of {self._reader.topology}, which does not fit "
                f"{stack} with a vocabulary of {vocab_size}"
            )

    def passages(self, batch: int, length: int, *, first: int) -> Passages:
        """Sequence b starts with document `first` + b, modulo the number of documents."""
        rows = [self._row(first + b, length) for b in range(batch)]
        tokens, experts = zip(*rows, strict=True)
        return Passages(torch.from_numpy(np.stack(tokens)), np.stack(experts))

    def _row(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, experts, missing = [], [], length
        while missing > 0:
            document = self._reader.document(index % len(self._reader))
            tokens.append(document.token_ids_T[:missing].astype(np.int64))
            experts.append(document.experts_TLK[:missing])
            missing -= len(tokens[-1])
            index += 1
        signed = signed_experts(np.concatenate(experts), self._reader.stack.num_experts)
        return np.concatenate(tokens), signed.astype(np.int64)


class RandomText:
    """Passages of random tokens, routed by the model's own router."""

    routes = "of the random router"

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def passages(self, batch: int, length: int, *, first: int) -> Passages:
        """Sequence b is drawn with seed `first` + b."""
        rows = [
            torch.randint(
                self._vocab_size, (length,), generator=torch.Generator().manual_seed(first + b)
            )
            for b in range(batch)
        ]
        return Passages(torch.stack(rows), None)


class EvenText(RandomText):
    """Passages of random tokens whose experts are drawn evenly: the hardest text for a cache."""

    routes = "drawn evenly"

    def __init__(self, vocab_size: int, stack: Stack) -> None:
        super().__init__(vocab_size)
        self._stack = stack

    def passages(self, batch: int, length: int, *, first: int) -> Passages:
        stack = self._stack
        shape = length, stack.num_layers, stack.num_experts
        rows = [
            np.argsort(np.random.default_rng(first + b).random(shape, np.float32), axis=-1)
            for b in range(batch)
        ]
        experts_BTLK = np.stack(rows)[..., : stack.top_k].astype(np.int64)
        return super().passages(batch, length, first=first)._replace(experts_BTLK=experts_BTLK)


Text = TracedText | RandomText


def _sizes(stack: Stack) -> list[tuple[int, int]]:
    return [(layer.num_experts, layer.top_k) for layer in stack.layers]


def passage_calls(passages: Passages, prompt: int) -> list[tuple[int, np.ndarray]]:
    """Expert calls of a run, in order: `prompt` tokens at once, then the others one by one.

    In the form that Belady's policy takes: (layer, distinct experts ascending).
    """
    experts_BTLK = passages.experts_BTLK
    assert experts_BTLK is not None
    edges = [0, *range(prompt, experts_BTLK.shape[1] + 1)]
    return [
        (layer, np.unique(experts_BTLK[:, start:stop, layer]))
        for start, stop in pairwise(edges)
        for layer in range(experts_BTLK.shape[2])
    ]
