"""The layers of captured steps' cache, one class for each kind of state.

All are transformers' own static layers over the shared storage. `owner` is the cache of one batch
size; it knows the step that runs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer, StaticLayer

from runtime.kv.state_kinds import StateKind
from runtime.kv.storage import StepTokens, Storage

CONV, RECURRENT = "conv", "recurrent"


class Owner(Protocol):
    """The cache that layers belong to."""

    step: StepTokens | None
    """The tokens of the step that runs; None: of a prompt, behind what is there."""

    def lengths(self, device: torch.device) -> Tensor:
        """Tokens in each layer, int64 [L]."""


def keys_and_values(layer: CacheLayerMixin) -> list[Tensor]:
    """Those that there are yet."""
    return [x for x in (layer.keys, layer.values) if isinstance(x, Tensor)]


class SharedLayer(StaticLayer):
    """A static layer whose keys and values are views of the storage.

    Sliding windows and chunks are kept whole; the step's mask hides what is not seen.
    """

    def __init__(self, owner: Owner, storage: Storage, index: int) -> None:
        super().__init__(max_cache_len=storage.context)
        self._owner, self._storage, self._index = owner, storage, index
        self.length = 0
        """Tokens here, as far as prompts go; captured steps count on the device."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys = self._storage.view(self._index, "keys", key_states, self.batch_size)
        self.values = self._storage.view(self._index, "values", value_states, self.batch_size)
        self.cumulative_length = self._owner.lengths(self.device)[self._index]
        self.is_initialized = True
        self._storage.claim(self)
        for tensor in (self.keys, self.values):
            tensor.zero_()  # another batch size may have left numbers that are not finite

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """A prompt that begins here attends to its own keys alone, not to all of the storage."""
        if not self.is_initialized:
            SharedLayer.lazy_initialization(self, key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self._owner.step is not None:
            self._owner.step.write(self.keys, self.values, key_states, value_states)
            return self.keys, self.values
        before, self.length = self.length, self.length + key_states.shape[-2]
        if before:
            self.cumulative_length.fill_(before)
            return StaticLayer.update(self, key_states, value_states, *args, **kwargs)
        self.keys[:, :, : self.length].copy_(key_states)
        self.values[:, :, : self.length].copy_(value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._owner.step is None and not self.length:
            return query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> Any:
        """Known on the host but within captured steps."""
        return self.length if self._owner.step is None else super().get_seq_length()

    def reset(self) -> None:
        """Start a new sequence. What the storage holds is masked out, but must be finite."""
        self.forget()
        self.cumulative_length.zero_()
        for tensor in self.stored:
            tensor.zero_()

    def forget(self) -> None:
        """What a new sequence changes on the host."""
        self._storage.claim(self)
        self.length = 0

    @property
    def stored(self) -> list[Tensor]:
        """All tensors of the layer."""
        return keys_and_values(self)

    @property
    def recurrent(self) -> list[Tensor]:
        """Those that a step changes for good: running it twice is not running it once."""
        return []


class SharedIndexedLayer(SharedLayer):
    """With an indexer's keys, [batch, context, width], of one length with the others."""

    def __init__(self, owner: Owner, storage: Storage, index: int) -> None:
        super().__init__(owner, storage, index)
        self.indexer_keys: Tensor | None = None
        self.indexer_position_ids: Tensor | None = None
        self._indexed = 0
        """Tokens of prompts whose keys are here."""

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Add the keys [batch, T, width] of new tokens; as `update`, of which attention sees."""
        new = indexer_key_states
        if self.indexer_keys is None:
            like = new.new_empty(0, self._storage.context, new.shape[-1])
            self.indexer_keys = self._storage.state(self._index, "indexer", like, len(new))
            self.indexer_keys.zero_()
        step = self._owner.step
        if step is not None:
            self.indexer_keys[step.rows_B, step.positions_B] = new.flatten(0, 1)
            return self.indexer_keys
        before, self._indexed = self._indexed, self._indexed + new.shape[1]
        self.indexer_keys[:, before : self._indexed] = new
        return self.indexer_keys if before else new

    def forget(self) -> None:
        super().forget()
        self._indexed, self.indexer_position_ids = 0, None

    @property
    def stored(self) -> list[Tensor]:
        indexer = [] if self.indexer_keys is None else [self.indexer_keys]
        return super().stored + indexer


class StatesLayer(LinearAttentionLayer):
    """transformers' own layer of states of one size, in memory that a subclass gives."""

    @abstractmethod
    def zeros(self, name: str, like: Tensor) -> Tensor:
        """Memory of a state of that name, zero."""

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        given = conv_states if recurrent_states is None else recurrent_states
        assert given is not None
        if self.device is None:
            self.dtype, self.device = given.dtype, given.device  # type: ignore[assignment]
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = self.zeros(f"{RECURRENT}{state_idx}", given)
            self.is_recurrent_states_initialized[state_idx] = True
            return
        kernel = given.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self.conv_kernel_size[state_idx] = kernel
        like = given.new_empty(*given.shape[:-1], kernel)
        self.conv_states[state_idx] = self.zeros(f"{CONV}{state_idx}", like)
        self.is_conv_states_initialized[state_idx] = True


class SharedRecurrentLayer(StatesLayer):
    """States that are views of the storage. Of a layer that keeps nothing it stays empty."""

    def __init__(
        self, owner: Owner, storage: Storage, index: int, number_of_states: int = 1
    ) -> None:
        super().__init__(number_of_states=number_of_states)
        self._storage, self._index = storage, index

    def zeros(self, name: str, like: Tensor) -> Tensor:
        return self._storage.state(self._index, name, like, len(like)).zero_()

    def forget(self) -> None:
        """What a new sequence changes on the host."""
        self._storage.claim(self)
        self.has_previous_state = dict.fromkeys(self.has_previous_state, False)

    @property
    def stored(self) -> list[Tensor]:
        """All tensors of the layer."""
        return self.recurrent

    @property
    def recurrent(self) -> list[Tensor]:
        """Those that a step changes for good: running it twice is not running it once."""
        states = [*self.conv_states.values(), *self.recurrent_states.values()]
        return [state for state in states if state is not None]


class SharedHybridLayer(SharedRecurrentLayer, SharedLayer):  # type: ignore[misc, override]
    """An attention and a recurrence side by side."""

    def __init__(
        self, owner: Owner, storage: Storage, index: int, number_of_states: int = 1
    ) -> None:
        SharedLayer.__init__(self, owner, storage, index)
        SharedRecurrentLayer.__init__(self, owner, storage, index, number_of_states)

    def forget(self) -> None:
        SharedLayer.forget(self)
        SharedRecurrentLayer.forget(self)

    def reset(self) -> None:
        SharedLayer.reset(self)

    @property
    def stored(self) -> list[Tensor]:
        return keys_and_values(self) + self.recurrent


def static_layer(
    kind: StateKind, owner: Owner, storage: Storage, index: int, number_of_states: int
) -> Any:
    """The layer of a kind."""
    if kind.recurs:
        layer = SharedRecurrentLayer if kind.mask is None else SharedHybridLayer
        return layer(owner, storage, index, number_of_states)
    if kind.mask is None:
        return SharedRecurrentLayer(owner, storage, index)
    return (SharedIndexedLayer if kind.indexes else SharedLayer)(owner, storage, index)
