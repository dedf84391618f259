"""The slot arena: one tensor per expert parameter, with the slots as its leading dimension."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spec(NamedTuple):
    """Shape and dtype of one parameter of one expert."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameter."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Specs = dict[str, Spec]
"""Shapes and dtypes of the parameters of one expert, by their name within it."""


def expert_bytes(specs: Specs) -> int:
    """Bytes of one expert."""
    return sum(spec.num_bytes for spec in specs.values())


class Arena:
    """`num_slots` slots for experts of one shape, on `device`."""

    def __init__(self, specs: Specs, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.slot_bytes = expert_bytes(specs)
        self.tensors = {
            name: torch.empty(num_slots, *spec.shape, dtype=spec.dtype, device=device)
            for name, spec in specs.items()
        }
        self._views = [
            {name: tensor[slot] for name, tensor in self.tensors.items()}
            for slot in range(num_slots)
        ]

    def slot(self, index: int) -> dict[str, Tensor]:
        """The parameters of the expert in slot `index`, as views."""
        return self._views[index]

    def close(self) -> None:
        """Free the memory of all slots."""
        self.tensors, self._views = {}, []
