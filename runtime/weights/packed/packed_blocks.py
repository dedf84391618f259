"""Experts packed into blocks and unpacked again, bit by bit the same."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.packed.block_layout import BlockLayout


class PackedBlocks(NamedTuple):
    """The packed blocks of the experts of a layer."""

    layout: BlockLayout
    transposed: bool
    """The model keeps its matrices [in, out]; blocks keep [out, in]."""

    @classmethod
    def of(cls, specs: Specs, patches: int, *, transposed: bool) -> PackedBlocks:
        """Blocks of experts with parameters `specs`, in the model's orientation.

        patches: entries of a chunk for its patches.
        """
        turned = {
            n: Spec(s.shape[::-1] if transposed else s.shape, s.dtype) for n, s in specs.items()
        }
        return cls(BlockLayout(turned, patches), transposed)

    @property
    def num_bytes(self) -> int:
        """Bytes of a block."""
        return 2 * self.layout.stored_units

    def parameters(self, block_N: Tensor) -> dict[str, Tensor]:
        """The parameters in an unpacked block, int16 [units]: views in the model's orientation."""
        views = self.layout.views(block_N)
        if not self.transposed:
            return views
        return {name: view.mT if view.dim() == 2 else view for name, view in views.items()}

    def unpack(self, stored_N: Tensor, into: dict[str, Tensor]) -> None:
        """Fill tensors, by parameter, from a block in host memory, int16 [stored units]."""
        found = self.parameters(self.layout.restore(stored_N))
        for name, target in into.items():
            target.copy_(found[name])

    def empty(self) -> Tensor:
        """Room for a block as stored, int16 [stored units]."""
        return torch.empty(self.layout.stored_units, dtype=torch.int16)
