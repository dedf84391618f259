"""An expert block: all parameters of an expert end to end, as host tier and slots keep them.

    int16 units   0 .......... | down_proj ............. | biases | padding
                  matrices, each padded to whole chunks  | others |

One flat block crosses the link: a copy need not know where a matrix ends. Weights of transposed
layouts are kept [out, in] in it. Where all is bfloat16, a block may be *stored* with its matrices
packed (see `packing`) and the other parameters as they are behind them. Or its matrices are stored
in codes, as their checkpoint has them (see `encodings`), each part from a multiple of 128 bytes on:

    int16 units   0 codes ..... | scales .. | bias | codes ..... | scales .. | padding
                  gate_up_proj                     down_proj
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.cuda.kernels.coded import Code
from runtime.cuda.memory.packing import pack, packed_bytes
from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.coded import Coding, part_name, stored_specs

CHUNK = 8192
"""int16 units in one chunk: what a program fetches at a time."""
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
        return -(-torch.Size(self.shape).numel() * self.dtype.itemsize // 2)


class ExpertBlock:
    """The layout of the blocks of experts with parameters `specs` (as stored).

    patches: of a packed chunk (`packing.PATCHES`); 0 for blocks that are not packed.
    coding: the matrices that are stored in codes, which are never packed.
    """

    def __init__(self, specs: Specs, patches: int = 0, coding: Coding | None = None) -> None:
        self._specs, self.patches, self.coding = specs, patches, coding or {}
        assert not (self.patches and self.coding), "a block is packed or in codes"
        self.fields: dict[str, Field] = {}
        matrices = {name: spec for name, spec in specs.items() if len(spec.shape) > 1}
        self.matrix_units = self._place(matrices, 0, CHUNK)
        """Length of the part that can be packed, a multiple of CHUNK."""
        end = self._place(specs, self.matrix_units, ALIGNMENT)
        self.units = _round_up(end, CHUNK)
        """Length, unpacked, a multiple of CHUNK."""
        self.stored_units = self.units
        """Length as stored, a multiple of CHUNK."""
        if patches:
            behind = end - self.matrix_units
            self.stored_units = _round_up(self._packed_units + behind, CHUNK)
        self.stored_fields = self.fields
        """Of the parameters as stored: parts of coded matrices."""
        if self.coding:
            self.stored_fields = {}
            at = 0
            for name, spec in stored_specs(specs, self.coding).items():
                field = self.stored_fields[name] = Field(at, spec.shape, spec.dtype)
                at += _round_up(field.units, ALIGNMENT)
            self.stored_units = _round_up(at, CHUNK)

    def _place(self, specs: Specs, at: int, alignment: int) -> int:
        """Place those of `specs` that have no place yet, from `at` on. Returns the end."""
        for name, spec in specs.items():
            if name not in self.fields:
                field = self.fields[name] = Field(at, spec.shape, spec.dtype)
                at += _round_up(field.units, alignment)
        return at

    def packed(self, patches: int) -> ExpertBlock:
        """The same, stored packed; with 0, not packed."""
        return ExpertBlock(self._specs, patches, self.coding)

    @property
    def plain(self) -> ExpertBlock:
        """The same, stored as they are: neither packed nor in codes."""
        return ExpertBlock(self._specs)

    @property
    def is_plain(self) -> bool:
        """Whether blocks are stored as they are."""
        return not self.patches and not self.coding

    @property
    def _packed_units(self) -> int:
        """Length of the packed matrices."""
        return packed_bytes(self.matrix_units // CHUNK, CHUNK, self.patches) // 2

    @property
    def num_chunks(self) -> int:
        """Chunks of a block as stored."""
        return self.stored_units // CHUNK

    @property
    def can_pack(self) -> bool:
        """Whether all of it is bfloat16, in rows of whole eights, and nothing in codes."""
        fields = self.fields.values()
        if self.coding:
            return False
        rows = [field.shape[-1] for field in fields if len(field.shape) > 1]
        return all(field.dtype == torch.bfloat16 for field in fields) and not any(
            row % 8 for row in rows
        )

    def start(self, name: str) -> int:
        """The start of a parameter in an unpacked block, in its own elements; 0 where there is no
        such parameter.
        """
        field = self.fields.get(name)
        return 0 if field is None else field.start * 2 // field.dtype.itemsize

    def start_stored(self, name: str) -> int:
        """The start of a bias in a block as stored, in its own elements; 0 where there is none."""
        if name not in self.fields or self.coding:
            field = self.stored_fields.get(name)
            return 0 if field is None else field.start * 2 // field.dtype.itemsize
        if not self.patches:
            return self.start(name)
        return self.start(name) - self.matrix_units + self._packed_units

    def code(self, name: str) -> Code | None:
        """The code of a matrix in a block as stored; None for one that is not coded."""
        if name not in self.coding:
            return None
        matrix, fields = self.coding[name], self.stored_fields
        starts = {part: 2 * fields[part_name(name, part)].start for part in matrix.parts}
        return Code.of(matrix.encoding, starts)

    def stored_views(self, units: Tensor) -> dict[str, Tensor]:
        """The parameters in blocks as stored, int16 [*, stored units]: views [*, *shape]."""
        stored = units.view(torch.uint8)
        return {
            name: stored[..., 2 * field.start :][..., : Spec(field.shape, field.dtype).num_bytes]
            .view(field.dtype)
            .unflatten(-1, field.shape)
            for name, field in self.stored_fields.items()
        }

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
        assert not self.coding, "blocks in codes are read, never made"
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
        stored_N[: self._packed_units] = packed.view(torch.int16)
        behind_N = block_N[self.matrix_units :][: self.stored_units - self._packed_units]
        stored_N[self._packed_units :][: len(behind_N)] = behind_N
        return stored_N


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
