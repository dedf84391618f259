"""Pages on their way between the device and pinned host memory, where it reads them in place.

All copies are enqueued in the order of the moves, on the stream that the steps run on: a page has
left before its place is written to, and is there before it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.kv.pages.places import Spilled
from runtime.kv.state_kinds import Mask


class Move(NamedTuple):
    """A page to be copied to another; those of host memory have the numbers behind the device's."""

    source: int
    target: int


def with_host_pages(layers: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each tensor with an entry for each position, of all layers, and its pages in host memory."""
    for layer in layers:
        spilled: Spilled | None = getattr(layer, "spilled", None)
        yield from zip(layer.by_position, spilled or repeat(None), strict=False)


def move_pages(states: Tensor, spilled: Tensor, moves: Iterable[Move]) -> None:
    """Copy pages of a layer. states: those of the device; spilled: those of host memory."""
    for source, target in moves:
        _page(states, spilled, target).copy_(_page(states, spilled, source), non_blocking=True)


def _page(states: Tensor, spilled: Tensor, number: int) -> Tensor:
    return states[number] if number < len(states) else spilled[number - len(states)]


def with_spilled(own: Tensor, spilled: Tensor | None, pages: Sequence[int]) -> Tensor:
    """A row's pages in their order: these of host memory, then `own`."""
    if spilled is None or not pages:
        return own
    first = [spilled[page].to(own.device, non_blocking=True) for page in pages]
    return torch.cat([torch.stack(first), own])


def wait_for_moves(states: Tensor) -> None:
    """Until the CPU finds in host memory what was sent there."""
    if states.is_cuda:
        torch.cuda.current_stream(states.device).synchronize()


def bytes_seen(
    layers: Iterable[tuple[Mask | None, Spilled | None]], away: int, position: int, page: int,
    window: int | None, chunk: int | None,
) -> int:  # fmt: skip
    """Bytes of a row's first `away` pages, of these layers, that its token at `position` sees."""
    first = {
        Mask.SLIDING: max(0, position + 1 - window) if window else 0,
        Mask.CHUNKED: position - position % chunk if chunk else 0,
    }
    return sum(
        max(0, away - first.get(mask, 0) // page)
        * (spilled.keys[0].nbytes + spilled.values[0].nbytes)
        for mask, spilled in layers
        if spilled is not None and mask is not None
    )
