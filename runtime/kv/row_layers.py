"""The layers of the cache of sequences in flight, one class for each kind of state.

Keys and values lie in rows, and a step writes to (row, position). States of one size are taken out
of their rows before a step and put back after it, so that the model may change them in place.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from runtime.kv.pages.places import Spilled
from runtime.kv.state_kinds import StateKind
from runtime.kv.static_layers import CONV, RECURRENT, StatesLayer, keys_and_values
from runtime.kv.token_layout import RaggedTokens


class Owner(Protocol):
    """The cache that layers belong to."""

    context: int
    layout: RaggedTokens

    @property
    def room(self) -> int:
        """Positions of a row."""

    def allocate(self, index: int, name: str, like: Tensor) -> Tensor:
        """Memory of layer `index` for a state `like` [*, ...] of every row: [R, ...]."""

    def allocate_pages(self, index: int, name: str, like: Tensor) -> Tensor:
        """Memory of layer `index` in pages, for entries `like` [*, heads, *, width]."""

    def allocate_host_pages(self, index: int, name: str, like: Tensor) -> Tensor | None:
        """Further pages in host memory; None where no page can lie there."""


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, [R, heads, context, width]."""

    spilled: Spilled | None = None
    """Of what lies in pages, that which is in host memory."""
    expands = False
    """Whether the model expands what it gets: then it gets the rows of the step alone."""

    def __init__(self, owner: Owner, index: int) -> None:
        super().__init__()
        self._owner, self._index = owner, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._allocate("keys", key_states)
        self.values = self._allocate("values", value_states)
        self.spilled = self._allocate_spilled(key_states, value_states)
        self.is_initialized = True

    def _allocate(self, name: str, like: Tensor) -> Tensor:
        """[R, ..., context, width] for new entries `like` [*, ..., T, width]."""
        shape = 0, *like.shape[1:-2], self._owner.room, like.shape[-1]
        return self._owner.allocate(self._index, name, like.new_empty(shape))

    def _allocate_spilled(self, key_states: Tensor, value_states: Tensor) -> Spilled | None:
        return None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            RowLayer.lazy_initialization(self, key_states, value_states)
        assert self.keys is not None and self.values is not None
        layout = self._owner.layout
        layout.write(self.keys, self.values, key_states, value_states)
        if self.expands:
            return layout.gathered(self.keys), layout.gathered(self.values)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._owner.context

    get_max_cache_shape = get_max_length
    """Its name in older versions of transformers."""

    @property
    def by_position(self) -> list[Tensor]:
        """Tensors with an entry for each position, [R, ..., context, width], or in pages."""
        return keys_and_values(self)

    @property
    def by_row(self) -> list[Tensor]:
        """Tensors of one size for each sequence, [R, ...]."""
        return []


class PagedLayer(RowLayer):
    """Keys and values of one layer in pages, [pages, heads, page, width]."""

    def _allocate(self, name: str, like: Tensor) -> Tensor:
        return self._owner.allocate_pages(self._index, name, like)

    def _allocate_spilled(self, key_states: Tensor, value_states: Tensor) -> Spilled | None:
        keys = self._owner.allocate_host_pages(self._index, "keys", key_states)
        values = self._owner.allocate_host_pages(self._index, "values", value_states)
        return None if keys is None or values is None else Spilled(keys, values)


class RowIndexedLayer(RowLayer):
    """With an indexer's keys, [R, context, width]."""

    def __init__(self, owner: Owner, index: int) -> None:
        super().__init__(owner, index)
        self.indexer_keys: Tensor | None = None
        self.indexer_position_ids: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Add the keys [batch, T, width] of new tokens: all keys of their sequences."""
        new, layout = indexer_key_states, self._owner.layout
        if self.indexer_keys is None:
            self.indexer_keys = self._allocate("indexer", new)
        self.indexer_keys[layout.rows_B, layout.positions_B] = new.flatten(0, 1)
        return layout.gathered(self.indexer_keys)

    @property
    def by_position(self) -> list[Tensor]:
        return super().by_position + ([] if self.indexer_keys is None else [self.indexer_keys])


class RowRecurrentLayer(StatesLayer):
    """States of one size: between `take` and `put`, those of the sequences of a step. Of a layer
    that keeps nothing it stays empty.
    """

    def __init__(self, owner: Owner, index: int, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)
        self._owner, self._index = owner, index
        self._stored: dict[tuple[str, int], Tensor] = {}
        """[R, ...] of each state, by its kind and number."""

    def zeros(self, name: str, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def take(self, rows_B: Tensor, *, is_new: bool) -> None:
        """Take the states of these rows, or begin without."""
        keeps = not is_new
        for number in range(self.number_of_states):
            self.has_previous_state[number] = keeps
            for name, states, flags in self._parts():
                stored = self._stored.get((name, number))
                has_state = keeps and stored is not None
                states[number] = stored[rows_B] if has_state and stored is not None else None
                flags[number] = has_state

    def put(self, rows_B: Tensor) -> None:
        """Put the states back to these rows."""
        for number in range(self.number_of_states):
            for name, states, _ in self._parts():
                state, key = states[number], (name, number)
                if state is None:
                    continue
                if key not in self._stored:
                    name = f"{name}{number}"
                    self._stored[key] = self._owner.allocate(self._index, name, state)
                self._stored[key][rows_B] = state
                states[number] = None

    def _parts(self) -> list[tuple[str, dict[int, Tensor | None], dict[int, bool]]]:
        return [
            (CONV, self.conv_states, self.is_conv_states_initialized),
            (RECURRENT, self.recurrent_states, self.is_recurrent_states_initialized),
        ]

    @property
    def by_position(self) -> list[Tensor]:
        """Tensors with an entry for each position."""
        return []

    @property
    def by_row(self) -> list[Tensor]:
        """Tensors of one size for each sequence, [R, ...]."""
        return list(self._stored.values())


class RowHybridLayer(RowRecurrentLayer, RowLayer):  # type: ignore[override]
    """An attention and a recurrence side by side."""

    def __init__(self, owner: Owner, index: int, number_of_states: int = 1) -> None:
        RowLayer.__init__(self, owner, index)
        RowRecurrentLayer.__init__(self, owner, index, number_of_states)

    get_max_length = RowLayer.get_max_length
    by_position = RowLayer.by_position


def row_layer(
    kind: StateKind, owner: Owner, index: int, number_of_states: int, *, paged: bool
) -> Any:
    """The layer of a kind. paged: where all kinds that keep positions can lie in pages."""
    if kind.recurs:
        layer = RowRecurrentLayer if kind.mask is None else RowHybridLayer
        return layer(owner, index, number_of_states)
    if kind.mask is None:
        return RowRecurrentLayer(owner, index)
    if paged:
        return PagedLayer(owner, index)
    attending = (RowIndexedLayer if kind.indexes else RowLayer)(owner, index)
    attending.expands = kind.expands
    return attending
