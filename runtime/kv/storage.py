"""Memory for the states of sequences, which caches of several batch sizes and rows share."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor


class Storage:
    """The states of all layers, for up to `batch` sequences of up to `context` tokens."""

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
        heads, width = like.shape[1], like.shape[3]
        return self.state(layer, name, like.new_empty(0, heads, self.context, width), batch)

    def state(self, layer: int, name: str, like: Tensor, batch: int) -> Tensor:
        """[batch, ...] for a state `like` [*, ...], of which every sequence has one."""
        if (layer, name) not in self._tensors:
            self._tensors[layer, name] = like.new_zeros(self.batch, *like.shape[1:])
        return self._tensors[layer, name][:batch]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())


class StepTokens(Protocol):
    """The tokens of a step, each with its row and position in the cache."""

    rows_B: Tensor
    positions_B: Tensor

    def write(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Write the tokens' keys and values to a layer's [rows, heads, context, width]."""
