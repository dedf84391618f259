"""Experts read from the blocks of a prepared model."""

from __future__ import annotations

import hashlib
import zlib
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from routing.layers import MoELayer
from runtime.weights.arena import Specs
from runtime.weights.encodings.coded import Coding, decode_expert, part_name
from runtime.weights.files import WatchedFile, is_raw
from runtime.weights.packed.packed_blocks import PackedBlocks
from runtime.weights.prepared.loss import read_loss
from runtime.weights.prepared.manifest import (
    BLOCKS,
    MANIFEST,
    LayerBlocks,
    read_manifest,
)
from runtime.weights.store import SkeletonStore


class PreparedStore(SkeletonStore):
    """A store that reads each expert from its block.

    An expert that goes to another host tier (pinned memory, `host="memory"`) is compared with its
    checksum by whoever reads it; one that goes to a slot is not.

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
        self._strides = [blocks.stride for blocks in self._blocks]
        self._packed = [blocks.packed for blocks in self._blocks]
        self._require_match(directory)
        if not any(self._packed):
            self.advice = (
                f"{directory} holds its experts unpacked, so the GPU had to pack them: `expertflow "
                "prepare MODEL OUT --packed` writes a copy that loads faster"
            )
        if manifest.is_lossy:
            self.loss = read_loss(directory, manifest.encodings)

    @property
    def identity(self) -> str:
        """Another one for other contents: letters and digits."""
        files = [self._file.path.parent / MANIFEST, self._file.path]
        found = [(one.stat().st_ino, one.stat().st_size, one.stat().st_mtime_ns) for one in files]
        return hashlib.sha256(repr((found, self.dtype)).encode()).hexdigest()[:24]

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

    def packed(self, layer: int) -> PackedBlocks | None:
        return self._packed[layer] if self.dtype == torch.bfloat16 else None

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        """Not compared with its checksum: a miss waits for it."""
        coding = self._coding[layer]
        packed = self._packed[layer]
        if packed is not None:
            stored_N = packed.empty()
            self._file.read(self._offset(layer, expert), stored_N, torch.int16)
            packed.unpack(stored_N, into)
            return
        coded = {name: target for name, target in into.items() if name in coding}
        self._read_parts(layer, expert, {n: t for n, t in into.items() if n not in coding})
        if coded:
            parts = {
                part_name(name, part): torch.empty(spec.shape, dtype=spec.dtype)
                for name in coded
                for part, spec in coding[name].parts.items()
            }
            self._read_parts(layer, expert, parts)
            decode_expert(parts, coding, coded)

    @torch.no_grad()
    def read_stored(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        """Raises ValueError for a block whose checksum is another."""
        packed, specs = self._packed[layer], self._stored[layer]
        if packed is not None:
            stored_N = packed.empty()
            self.read_packed(layer, expert, stored_N)
            packed.unpack(stored_N, into)
            return
        assert into.keys() == specs.keys(), "a checksum is of a whole block"
        parts = {
            name: into[name]
            if is_raw(into[name], spec.dtype)
            else torch.empty(spec.shape, dtype=spec.dtype)
            for name, spec in specs.items()
        }
        self._read_parts(layer, expert, parts)
        self._require_intact(layer, expert, list(parts.values()))
        for name, target in into.items():
            if target is not parts[name]:
                target.copy_(parts[name])

    def read_packed(self, layer: int, expert: int, into: Tensor) -> None:
        """Raises ValueError for a block whose checksum is another."""
        self._file.read(self._offset(layer, expert), into, torch.int16)
        self._require_intact(layer, expert, [into])

    def _offset(self, layer: int, expert: int) -> int:
        return self._blocks[layer].start + expert * self._strides[layer]

    def _read_parts(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        start = self._offset(layer, expert)
        for name, target in into.items():
            dtype = self._stored[layer][name].dtype
            self._file.read(start + self._starts[layer][name], target, dtype)

    def _require_intact(self, layer: int, expert: int, parts: list[Tensor]) -> None:
        """Compare a block, read in pieces, with its checksum."""
        found = 0
        for part in parts:
            found = zlib.crc32(part.detach().reshape(-1).view(torch.uint8).numpy().data, found)
        self._blocks[layer].require_intact(self._file.path, expert, found)


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
