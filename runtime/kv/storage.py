"""Memory for the states of sequences, which caches of several batch sizes and rows share."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from runtime.kv.pages import places


class StorageSize(NamedTuple):
    """The size of a storage."""

    batch: int
    context: int
    """Tokens of each sequence at the most."""
    tokens: int | None = None
    """Of all together; None: batch x context."""
    spilled: int = 0
    """Further ones, in pages of host memory."""


def _plain(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


class Storage:
    """The states of all layers, for up to `batch` sequences of up to `context` tokens.

    tokens: those of all sequences together, whose keys and values lie in pages then; None where
    every sequence has `context` of its own. The same memory serves a few whole rows as well.
    spilled: further tokens, in pages of host memory. allocate_host: memory that the device reads.
    """

    def __init__(
        self, batch: int, context: int, tokens: int | None = None, spilled: int = 0, *,
        allocate_host: Callable[[tuple[int, ...], torch.dtype], Tensor] = _plain,
    ) -> None:  # fmt: skip
        self.batch, self.context, self.tokens, self.spilled = batch, context, tokens, spilled
        self.page, self._allocate_host = places.PAGE, allocate_host
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._on_host: dict[tuple[int, str], Tensor] = {}
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

    @property
    def size(self) -> StorageSize:
        """What another one of this size is made of."""
        return StorageSize(self.batch, self.context, self.tokens, self.spilled)

    @property
    def num_pages(self) -> int | None:
        """None: there are no pages."""
        return None if self.tokens is None else -(-self.tokens // self.page)

    @property
    def num_host_pages(self) -> int:
        return -(-self.spilled // self.page)

    @property
    def whole_rows(self) -> int:
        """Sequences that can have `context` tokens in one piece."""
        if self.num_pages is None:
            return self.batch
        return min(self.batch, self.num_pages * self.page // self.context)

    def view(self, layer: int, name: str, like: Tensor, batch: int) -> Tensor:
        """[batch, heads, context, width] for states `like` [*, heads, *, width]."""
        heads, width = like.shape[1], like.shape[3]
        if self.num_pages is None:
            return self.state(layer, name, like.new_empty(0, heads, self.context, width), batch)
        assert batch <= self.whole_rows
        shape = batch, heads, self.context, width
        return self.pages(layer, name, like).view(-1)[: math.prod(shape)].view(shape)

    def pages(self, layer: int, name: str, like: Tensor) -> Tensor:
        """[pages, heads, page, width] for states `like` [*, heads, *, width]."""
        assert self.num_pages is not None
        if (layer, name) not in self._tensors:
            shape = self.num_pages, like.shape[1], self.page, like.shape[3]
            self._tensors[layer, name] = like.new_zeros(shape)
        return self._tensors[layer, name]

    def host_pages(self, layer: int, name: str, like: Tensor) -> Tensor | None:
        """The same in host memory; None where no page can lie there."""
        if not self.num_host_pages:
            return None
        if (layer, name) not in self._on_host:
            shape = self.num_host_pages, like.shape[1], self.page, like.shape[3]
            self._on_host[layer, name] = self._allocate_host(shape, like.dtype)
        return self._on_host[layer, name]

    def state(self, layer: int, name: str, like: Tensor, batch: int) -> Tensor:
        """[batch, ...] for a state `like` [*, ...], of which every sequence has one."""
        if (layer, name) not in self._tensors:
            self._tensors[layer, name] = like.new_zeros(self.batch, *like.shape[1:])
        return self._tensors[layer, name][:batch]

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


class StepTokens(Protocol):
    """The tokens of a step, each with its row and position in the cache."""

    rows_B: Tensor
    positions_B: Tensor

    def write(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Write the tokens' keys and values to a layer's memory."""
