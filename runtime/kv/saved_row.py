"""Keys and values of a row, copied to another row or kept outside of the cache, bit by bit.

Good for kinds of attention that a row can be cut at (`PLAIN`): every position has its own keys and
values, whatever came after it.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from torch import Tensor

from runtime.kv.row_cache import RowCache, RowLayer


class SavedRow(NamedTuple):
    """The first tokens of a row, in host memory."""

    states: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer that has any, [heads, tokens, width]."""
    num_tokens: int

    @classmethod
    def of(cls, cache: RowCache, row: int, num_tokens: int) -> Self:
        """A copy of the first `num_tokens` of `row`."""
        states = [
            (_copy(layer.keys, row, num_tokens), _copy(layer.values, row, num_tokens))
            for layer in _filled(cache)
        ]
        return cls(states, num_tokens)

    def restore(self, cache: RowCache, row: int) -> None:
        """Write it to `row`."""
        for layer, (keys, values) in zip(_filled(cache), self.states, strict=True):
            layer.keys[row, :, : self.num_tokens].copy_(keys)  # type: ignore[index]
            layer.values[row, :, : self.num_tokens].copy_(values)  # type: ignore[index]


def copy_row(cache: RowCache, source: int, target: int, num_tokens: int) -> None:
    """Copy the first `num_tokens` of row `source` to row `target`."""
    for layer in _filled(cache):
        for tensor in (layer.keys, layer.values):
            assert tensor is not None
            tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]


def _filled(cache: RowCache) -> list[RowLayer]:
    return [layer for layer in cache.layers if isinstance(layer, RowLayer) and layer.is_initialized]


def _copy(tensor: Tensor | None, row: int, num_tokens: int) -> Tensor:
    assert tensor is not None
    return tensor[row, :, :num_tokens].to("cpu", copy=True)
