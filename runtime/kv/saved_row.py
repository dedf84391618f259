"""The state of a row, copied to another row or kept outside of the cache, bit by bit.

What has an entry for each position (`keeps_positions`) can be cut after any token; a state of one
size is kept as it is after the last one.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from torch import Tensor

from runtime.kv.row_cache import RowCache


class SavedRow(NamedTuple):
    """The state of a row after its first tokens, in host memory."""

    by_position: list[Tensor]
    """Keys and values of all layers, [..., tokens, width], or their pages."""
    by_row: list[Tensor]
    """States of one size."""
    num_tokens: int

    @classmethod
    def of(cls, cache: RowCache, row: int, num_tokens: int) -> Self:
        """A copy of what `row` has kept of its first `num_tokens`, which are all that ran."""
        positions = list(cache.beginnings(row, num_tokens, on_host=True))
        rows = [tensor[row].to("cpu", copy=True) for tensor in cache.by_row]
        return cls(positions, rows, num_tokens)

    def restore(self, cache: RowCache, row: int) -> None:
        """Write it to `row`."""
        at = cache.entries(row, self.num_tokens)
        for tensor, kept in zip(cache.by_position, self.by_position, strict=True):
            tensor[at] = kept.to(tensor.device)
        for tensor, kept in zip(cache.by_row, self.by_row, strict=True):
            tensor[row].copy_(kept)


def copy_row(cache: RowCache, source: int, target: int, num_tokens: int) -> None:
    """Copy the first `num_tokens` of row `source` to row `target`: all that ran, where states of
    one size are kept.
    """
    for tensor in cache.by_row:
        tensor[target] = tensor[source]
    to = cache.entries(target, num_tokens)
    found = cache.beginnings(source, num_tokens)
    for tensor, states in zip(cache.by_position, found, strict=True):
        tensor[to] = states
