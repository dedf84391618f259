"""The key/value cache of captured steps: transformers' StaticCache over storage of our own.

Every batch size has its own cache object, since a captured step holds on to its tensors, but all
share one storage, as large as the largest batch needs.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer


class Storage:
    """Keys and values of all layers, for up to `batch` sequences of up to `context` tokens."""

    def __init__(self, batch: int, context: int) -> None:
        self.batch, self.context = batch, context
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._tenant: weakref.ref[Any] | None = None
        self._writer: object = None

    def take(self, tenant: object) -> bool:
        """Whether `tenant` has the storage to itself now, until it lets go or is dropped."""
        if self.is_lent and self._tenant is not None and self._tenant() is not tenant:
            return False
        self._tenant = weakref.ref(tenant)
        return True

    def let_go(self, tenant: object) -> None:
        """Whoever comes next may take the storage, if it was `tenant` who had it."""
        if self._tenant is not None and self._tenant() is tenant:
            self._tenant = None

    @property
    def is_lent(self) -> bool:
        """Whether somebody's sequences are in it."""
        return self._tenant is not None and self._tenant() is not None

    def claim(self, writer: object) -> bool:
        """Let `writer` be the one that writes; False where another wrote since it last was, and
        may have left nothing of what it had stored.
        """
        unchanged, self._writer = self._writer is writer, writer
        return unchanged

    def view(self, layer: int, name: str, like: Tensor, batch: int) -> Tensor:
        """[batch, heads, context, width] for states `like` [*, heads, *, width]."""
        if (layer, name) not in self._tensors:
            _, heads, _, width = like.shape
            shape = self.batch, heads, self.context, width
            self._tensors[layer, name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self._tensors[layer, name][:batch]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())


class StepTokens(Protocol):
    """The tokens of a step, each with its row and position in the cache."""

    def write(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Write the tokens' keys and values to a layer's [rows, heads, context, width]."""


class SharedLayer(StaticLayer):
    """A static layer whose keys and values are views of the storage of `cache`.

    Sliding windows are kept whole; the step's mask hides what is out of the window.
    """

    def __init__(self, cache: SharedCache, storage: Storage, index: int) -> None:
        super().__init__(max_cache_len=storage.context)
        self._cache, self._storage, self._index = cache, storage, index
        self.length = 0
        """Tokens here, as far as prompts go; captured steps count on the device."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys = self._storage.view(self._index, "keys", key_states, self.batch_size)
        self.values = self._storage.view(self._index, "values", value_states, self.batch_size)
        self.cumulative_length = self._cache.lengths(self.device)[self._index]
        self.is_initialized = True
        self.reset()  # another batch size may have left numbers that are not finite

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """A prompt that begins here attends to its own keys alone, not to all of the storage."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self._cache.step is not None:
            self._cache.step.write(self.keys, self.values, key_states, value_states)
            return self.keys, self.values
        before, self.length = self.length, self.length + key_states.shape[-2]
        if before:
            self.cumulative_length.fill_(before)
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys[:, :, : self.length].copy_(key_states)
        self.values[:, :, : self.length].copy_(value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self._cache.step is None and not self.length:
            return query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> Any:
        """Known on the host but within captured steps."""
        return self.length if self._cache.step is None else super().get_seq_length()

    def reset(self) -> None:
        """Start a new sequence. What the storage holds is masked out, but must be finite."""
        self._storage.claim(self)
        self.length = 0
        self.cumulative_length.zero_()
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys.zero_()
            self.values.zero_()


class SharedCache(Cache):
    """The cache of one batch size."""

    def __init__(self, storage: Storage, num_layers: int) -> None:
        self.step: StepTokens | None = None
        """The tokens of the step that runs; None: of a prompt, behind what is there."""
        self._num_layers, self._storage = num_layers, storage
        self._lengths_L: Tensor | None = None
        self._own_layers = [SharedLayer(self, storage, index) for index in range(num_layers)]
        super().__init__(layers=list(self._own_layers))

    def lengths(self, device: torch.device) -> Tensor:
        """Tokens in each layer, int64 [L]."""
        if self._lengths_L is None:
            self._lengths_L = torch.zeros(self._num_layers, dtype=torch.int64, device=device)
        return self._lengths_L

    def set_length(self, length: int) -> None:
        """Forget what lies beyond `length` tokens."""
        for layer in self._own_layers:
            layer.length = length
        if self._lengths_L is not None:
            self._lengths_L.fill_(length)

    def reset(self) -> None:
        """As the layers' own, in a few launches for all of them."""
        stored: list[Tensor] = []
        for layer in self._own_layers:
            self._storage.claim(layer)
            if layer.is_initialized:
                assert layer.keys is not None and layer.values is not None
                stored += [layer.keys, layer.values]
        self.set_length(0)
        if stored:
            torch._foreach_zero_(stored)
