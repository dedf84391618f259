"""An expert's record: all its parameters end to end, as the host tier and the slots keep them.

    int16 units   0 .......... | offset of down_proj ... | ... biases | padding to CHUNK
    parameter     gate_up_proj | down_proj               | ...        |

One flat record is what crosses the link: it does not matter to a copy where a matrix ends. Weights
of the model's transposed layouts are kept [out, in] in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.arena import Specs

CHUNK = 8192
"""int16 units in one chunk: what a program fetches at a time."""
ALIGNMENT = 64
"""int16 units: parameters start at multiples of 128 bytes."""


class Field(NamedTuple):
    """Where a parameter lies in the record."""

    start: int
    """in int16 units"""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def units(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize // 2


class Record:
    """The layout of the records of experts with parameters `specs` (as stored)."""

    def __init__(self, specs: Specs) -> None:
        self.fields: dict[str, Field] = {}
        at = 0
        for name, spec in specs.items():
            field = Field(at, spec.shape, spec.dtype)
            self.fields[name] = field
            at += -(-field.units // ALIGNMENT) * ALIGNMENT
        self.units = -(-at // CHUNK) * CHUNK
        """Length, a multiple of CHUNK."""

    @property
    def num_chunks(self) -> int:
        return self.units // CHUNK

    @property
    def is_bf16(self) -> bool:
        """Whether all of it is bfloat16, which packs."""
        return all(field.dtype == torch.bfloat16 for field in self.fields.values())

    def start(self, name: str) -> int:
        """Where a parameter starts, in its own elements; 0 for a bias that there is not."""
        field = self.fields.get(name)
        return 0 if field is None else field.start * 2 // field.dtype.itemsize

    def views(self, units: Tensor) -> dict[str, Tensor]:
        """The parameters in records `units`, int16 [*, units]: views [*, *shape]."""
        return {
            name: units[..., field.start : field.start + field.units]
            .view(field.dtype)
            .unflatten(-1, field.shape)
            for name, field in self.fields.items()
        }
