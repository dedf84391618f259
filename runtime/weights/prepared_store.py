"""A prepared model (`runtime.prepare`): every expert is one contiguous block of one file.

config.json, tokenizer ...    as in the checkpoint
model.resident.safetensors    all weights but the experts
experts.bin                   the blocks, each on a page boundary
experts.json                  the manifest: offsets of each layer's blocks, and their checksums
"""

from __future__ import annotations

import json
import zlib
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from routing.layers import MoELayer
from runtime.weights.arena import Spec, Specs, expert_bytes
from runtime.weights.files import WatchedFile
from runtime.weights.store import SkeletonStore

MANIFEST = "experts.json"
BLOCKS = "experts.bin"
VARIANT = "resident"
RESIDENT = f"model.{VARIANT}.safetensors"
SCHEMA = 1
PAGE = 4096
"""Alignment of the blocks in bytes: pages can be registered with a GPU."""


class LayerBlocks(NamedTuple):
    """The blocks of one MoE layer in `experts.bin`."""

    name: str
    """Name of the layer in the model."""
    start: int
    """Offset of the first expert's block, in bytes."""
    parameters: dict[str, tuple[str, list[int]]]
    """dtype and shape of each parameter, in their order within a block."""
    checksums: list[int]
    """CRC-32 of each expert's block, without its padding."""

    @property
    def specs(self) -> Specs:
        """Shapes and dtypes of the parameters as stored."""
        return {
            name: Spec(tuple(shape), getattr(torch, dtype))
            for name, (dtype, shape) in self.parameters.items()
        }

    def offset(self, expert: int) -> int:
        """Offset of the block of `expert`, in bytes."""
        return self.start + expert * stride(self.specs)

    @property
    def stop(self) -> int:
        """Offset after the last block, without its padding."""
        return self.offset(len(self.checksums) - 1) + expert_bytes(self.specs)


def stride(specs: Specs) -> int:
    """Bytes from one block of a layer to the next."""
    return -(-expert_bytes(specs) // PAGE) * PAGE


def is_prepared(directory: Path) -> bool:
    """True for a directory that `runtime.prepare` wrote."""
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> list[LayerBlocks]:
    """Read the manifest of a prepared directory, one entry a layer.

    Raises ValueError for a file that is no manifest, or one of another version.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"schema {manifest['schema']}")
        layers = [LayerBlocks(**layer) for layer in manifest["layers"]]
        if not all(isinstance(layer.stop, int) for layer in layers):
            raise ValueError("offsets are not whole numbers")
        return layers
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a manifest of experts ({error!r}); prepare the model again"
        ) from error


class PreparedStore(SkeletonStore):
    """A store that reads each expert from its block.

    dtype: the dtype in which experts are handed out; None for the stored one.
    Raises ValueError if the blocks belong to another model, or if the file is truncated.
    """

    def __init__(
        self,
        directory: Path,
        meta_layers: list[MoELayer],
        layers: list[MoELayer],
        dtype: torch.dtype | None,
    ) -> None:
        self._blocks = read_manifest(directory)
        self._file = open_blocks(directory, self._blocks)
        self._stored = [blocks.specs for blocks in self._blocks]
        first = next(iter(self._stored[0].values()))
        super().__init__(meta_layers, layers, dtype or first.dtype)
        self._starts = [_starts(specs) for specs in self._stored]
        self._strides = [stride(specs) for specs in self._stored]
        self._require_match(directory)

    def _require_match(self, directory: Path) -> None:
        ours = [(layer.name, layer.num_experts) for layer in self.layers]
        theirs = [(blocks.name, len(blocks.checksums)) for blocks in self._blocks]
        for layer, stored in enumerate(self._stored if ours == theirs else []):
            if {n: spec.shape for n, spec in stored.items()} != {
                n: spec.shape for n, spec in self.specs(layer).items()
            }:
                theirs[layer] = (f"other shapes in {ours[layer][0]}", 0)
        if ours != theirs:
            raise ValueError(
                f"{directory / MANIFEST} is of another model than its config.json; prepare it again"
            )

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        start = self._blocks[layer].start + expert * self._strides[layer]
        for name, target in into.items():
            dtype = self._stored[layer][name].dtype
            self._file.read(start + self._starts[layer][name], target, dtype)


def _starts(specs: Specs) -> dict[str, int]:
    """Offset of each parameter within a block, in bytes."""
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


def checksum(block: Tensor) -> int:
    """CRC-32 of a block, a uint8 tensor [bytes]."""
    return zlib.crc32(block.numpy().data)


def verify(directory: Path) -> int:
    """Read all weights and compare their checksums. Returns the number of experts.

    Raises ValueError naming the first damaged expert or file.
    """
    blocks = read_manifest(directory)
    for name, expected in _file_checksums(directory).items():
        if not (directory / name).is_file() or file_checksum(directory / name) != expected:
            raise ValueError(f"{directory / name} is damaged or changed; prepare the model again")
    file = open_blocks(directory, blocks)
    for layer in blocks:
        block = torch.empty(expert_bytes(layer.specs), dtype=torch.uint8)
        for expert, expected in enumerate(layer.checksums):
            file.read(layer.offset(expert), block, torch.uint8)
            if checksum(block) != expected:
                raise ValueError(
                    f"{directory / BLOCKS}: expert {expert} of {layer.name} is damaged; prepare "
                    "the model again"
                )
    return sum(len(layer.checksums) for layer in blocks)


def file_checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            found = zlib.crc32(piece, found)
    return found


def _file_checksums(directory: Path) -> dict[str, int]:
    """CRC-32 of each file with other weights; models prepared before there were any have none."""
    files = json.loads((directory / MANIFEST).read_text()).get("files", {})
    named = isinstance(files, dict) and all(Path(name).name == name for name in files)
    if not named:
        raise ValueError(f"{directory / MANIFEST} names files elsewhere; prepare the model again")
    return dict(files)
