"""The layout of an expert block: all parameters of an expert end to end, as it is or packed.

    int16 units   0 .......... | down_proj ............. | biases | padding
                  matrices, each padded to whole chunks  | others |

Where all is bfloat16, a block may be *stored* with its matrices packed (see `packing`) and the
other parameters as they are behind them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.weights.arena import Specs
from runtime.weights.packed.packing import pack, packed_bytes, unpack

CHUNK = 8192
"""int16 units in one chunk, of which each has patches of its own."""
ALIGNMENT = 64
"""int16 units: parameters start at multiples of 128 bytes."""


class Field(NamedTuple):
    """The place of a parameter in the block."""

    start: int
    """in int16 units"""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def units(self) -> int:
        """Length in int16 units."""
        return -(-torch.Size(self.shape).numel() * self.dtype.itemsize // 2)


class BlockLayout:
    """The layout of the blocks of experts with parameters `specs`.

    patches: of a packed chunk (`packing.PATCHES`); 0 for blocks that are not packed.
    """

    def __init__(self, specs: Specs, patches: int = 0) -> None:
        self._specs, self.patches = specs, patches
        self.fields: dict[str, Field] = {}
        matrices = {name: spec for name, spec in specs.items() if len(spec.shape) > 1}
        self.matrix_units = self._place(matrices, 0, CHUNK)
        """Length of the part that can be packed, a multiple of CHUNK."""
        end = self._place(specs, self.matrix_units, ALIGNMENT)
        self.units = round_up(end, CHUNK)
        """Length, unpacked, a multiple of CHUNK."""
        self.stored_units = self.units
        """Length as stored, a multiple of CHUNK."""
        if patches:
            behind = end - self.matrix_units
            self.stored_units = round_up(self.packed_units + behind, CHUNK)

    def _place(self, specs: Specs, at: int, alignment: int) -> int:
        """Place those of `specs` that have no place yet, from `at` on. Returns the end."""
        for name, spec in specs.items():
            if name not in self.fields:
                field = self.fields[name] = Field(at, spec.shape, spec.dtype)
                at += round_up(field.units, alignment)
        return at

    @property
    def packed_units(self) -> int:
        """Length of the packed matrices."""
        return packed_bytes(self.matrix_units // CHUNK, CHUNK, self.patches) // 2

    @property
    def can_pack(self) -> bool:
        """Whether all of it is bfloat16, in rows of whole eights."""
        fields = self.fields.values()
        rows = [field.shape[-1] for field in fields if len(field.shape) > 1]
        return all(field.dtype == torch.bfloat16 for field in fields) and not any(
            row % 8 for row in rows
        )

    def views(self, units: Tensor) -> dict[str, Tensor]:
        """The parameters in unpacked blocks, int16 [*, units]: views [*, *shape]."""
        return {
            name: units[..., field.start : field.start + field.units]
            .view(field.dtype)
            .unflatten(-1, field.shape)
            for name, field in self.fields.items()
        }

    def store(self, block_N: Tensor) -> Tensor | None:
        """Store an unpacked block, int16 [units], as int16 [stored_units]; None where a chunk
        has no room for its patches.
        """
        if not self.patches:
            return block_N
        ends = [*(field.start for field in self.fields.values()), self.matrix_units]
        starts = sorted({end for end in ends if end <= self.matrix_units})
        chunks_DC = block_N[: self.matrix_units].view(-1, CHUNK)
        sizes = [(b - a) // CHUNK for a, b in pairwise(starts)]
        packed = pack(list(chunks_DC.split(sizes)), self.patches)
        if packed is None:
            return None
        stored_N = block_N.new_zeros(self.stored_units)
        stored_N[: self.packed_units] = packed.view(torch.int16)
        behind_N = block_N[self.matrix_units :][: self.stored_units - self.packed_units]
        stored_N[self.packed_units :][: len(behind_N)] = behind_N
        return stored_N

    def restore(self, stored_N: Tensor) -> Tensor:
        """Undo `store`, on the CPU: the unpacked block, int16 [units]."""
        if not self.patches:
            return stored_N
        block_N = stored_N.new_zeros(self.units)
        packed = stored_N[: self.packed_units].view(torch.uint8)
        unpack(packed, CHUNK, self.patches, block_N[: self.matrix_units].view(-1, CHUNK))
        behind_N = stored_N[self.packed_units :][: self.units - self.matrix_units]
        block_N[self.matrix_units :][: len(behind_N)] = behind_N
        return block_N


def round_up(number: int, multiple: int) -> int:
    """The next multiple, from `number` on."""
    return -(-number // multiple) * multiple
