"""Experts read from the blocks of a prepared model."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from routing.layers import MoELayer
from runtime.weights.arena import Specs
from runtime.weights.encodings.coded import Coding, decode_expert, part_name
from runtime.weights.files import WatchedFile
from runtime.weights.prepared.loss import read_loss
from runtime.weights.prepared.manifest import (
    BLOCKS,
    MANIFEST,
    LayerBlocks,
    read_manifest,
    stride,
)
from runtime.weights.store import SkeletonStore


class PreparedStore(SkeletonStore):
    """A store that reads each expert from its block.

    dtype: the dtype in which experts are handed out; None for the stored one, which is bfloat16
        where all are kept in codes.
    Raises ValueError if the blocks belong to another model, or if the file is truncated.
    """

    def __init__(
        self,
        directory: Path,
        meta_layers: list[MoELayer],
        layers: list[MoELayer],
        dtype: torch.dtype | None,
    ) -> None:
        manifest = read_manifest(directory)
        self._blocks = manifest.layers
        self._file = open_blocks(directory, self._blocks)
        self._stored = [blocks.specs for blocks in self._blocks]
        self._coding = [blocks.coding for blocks in self._blocks]
        super().__init__(meta_layers, layers, dtype or self._stored_dtype())
        self._starts = [_starts(specs) for specs in self._stored]
        self._strides = [stride(specs) for specs in self._stored]
        self._require_match(directory)
        if manifest.is_lossy:
            self.loss = read_loss(directory, manifest.encodings)

    def _stored_dtype(self) -> torch.dtype:
        stored, shapes = self._stored[0], self._blocks[0].shapes
        plain = [spec.dtype for name, spec in stored.items() if name in shapes]
        return plain[0] if plain else torch.bfloat16

    def _require_match(self, directory: Path) -> None:
        ours = [(layer.name, layer.num_experts) for layer in self.layers]
        theirs = [(blocks.name, len(blocks.checksums)) for blocks in self._blocks]
        for layer, blocks in enumerate(self._blocks if ours == theirs else []):
            if blocks.shapes != {n: spec.shape for n, spec in self.specs(layer).items()}:
                theirs[layer] = (f"other shapes in {ours[layer][0]}", 0)
        if ours != theirs:
            raise ValueError(
                f"{directory / MANIFEST} is of another model than its config.json; prepare it again"
            )

    def coding(self, layer: int) -> Coding:
        return self._coding[layer]

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        coding = self._coding[layer]
        coded = {name: target for name, target in into.items() if name in coding}
        self.read_stored(layer, expert, {n: t for n, t in into.items() if n not in coding})
        if coded:
            parts = {
                part_name(name, part): torch.empty(spec.shape, dtype=spec.dtype)
                for name in coded
                for part, spec in coding[name].parts.items()
            }
            self.read_stored(layer, expert, parts)
            decode_expert(parts, coding, coded)

    @torch.no_grad()
    def read_stored(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        start = self._blocks[layer].start + expert * self._strides[layer]
        for name, target in into.items():
            dtype = self._stored[layer][name].dtype
            self._file.read(start + self._starts[layer][name], target, dtype)


def _starts(specs: Specs) -> dict[str, int]:
    """Offset of each tensor within a block, in bytes."""
    sizes = [spec.num_bytes for spec in specs.values()]
    return dict(zip(specs, accumulate(sizes, initial=0), strict=False))


def open_blocks(directory: Path, blocks: list[LayerBlocks]) -> WatchedFile:
    """Open the file of blocks.

    Raises ValueError if it is missing, or shorter than the manifest says.
    """
    path = directory / BLOCKS
    if not path.is_file():
        raise ValueError(f"{path} is missing; prepare the model again")
    file = WatchedFile(path)
    needed = max(layer.stop for layer in blocks)
    if file.num_bytes < needed:
        raise ValueError(
            f"{path} has {file.num_bytes:,} bytes instead of {needed:,}; prepare the model again"
        )
    return file
