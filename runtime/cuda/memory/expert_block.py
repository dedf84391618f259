"""An expert block as the host tier and the slots of a GPU keep it: as it is, packed, or in codes.

One flat block crosses the link: a copy need not know where a matrix ends. Weights of transposed
layouts are kept [out, in] in it. `runtime.weights.packed.block_layout` says where parameters lie in
a block as it is, and in a packed one. Or its matrices are stored in codes, as their checkpoint has
them (see `encodings`), each part from a multiple of 128 bytes on:

    int16 units   0 codes ..... | scales .. | bias | codes ..... | scales .. | padding
                  gate_up_proj                     down_proj
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.cuda.kernels.coded import Code
from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.coded import Coding, part_name, stored_specs
from runtime.weights.packed import block_layout
from runtime.weights.packed.block_layout import BlockLayout, Field, round_up

CHUNK = block_layout.CHUNK
"""int16 units in one chunk: what a program fetches at a time."""
ALIGNMENT = block_layout.ALIGNMENT
"""int16 units: parameters start at multiples of 128 bytes."""


class ExpertBlock(BlockLayout):
    """The layout of the blocks of experts with parameters `specs` (as stored).

    patches: of a packed chunk (`packing.PATCHES`); 0 for blocks that are not packed.
    coding: the matrices that are stored in codes, which are never packed.
    """

    def __init__(self, specs: Specs, patches: int = 0, coding: Coding | None = None) -> None:
        super().__init__(specs, patches)
        self.coding = coding or {}
        assert not (self.patches and self.coding), "a block is packed or in codes"
        self.stored_fields = self.fields
        """Of the parameters as stored: parts of coded matrices."""
        if self.coding:
            self.stored_fields = {}
            at = 0
            for name, spec in stored_specs(specs, self.coding).items():
                field = self.stored_fields[name] = Field(at, spec.shape, spec.dtype)
                at += round_up(field.units, ALIGNMENT)
            self.stored_units = round_up(at, CHUNK)

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
    def num_chunks(self) -> int:
        """Chunks of a block as stored."""
        return self.stored_units // CHUNK

    @property
    def can_pack(self) -> bool:
        """Whether all of it is bfloat16, in rows of whole eights, and nothing in codes."""
        return not self.coding and super().can_pack

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
        return self.start(name) - self.matrix_units + self.packed_units

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

    def store(self, block_N: Tensor) -> Tensor | None:
        assert not self.coding, "blocks in codes are read, never made"
        return super().store(block_N)
