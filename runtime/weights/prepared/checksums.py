"""A prepared model compared with its checksums."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from runtime.weights.prepared.manifest import BLOCKS, read_file_checksums, read_manifest
from runtime.weights.prepared.store import open_blocks


def verify(directory: Path) -> int:
    """Read all weights and compare their checksums. Returns the number of experts.

    Raises ValueError naming the first damaged expert or file.
    """
    blocks = read_manifest(directory).layers
    for name, expected in read_file_checksums(directory).items():
        if not (directory / name).is_file() or file_checksum(directory / name) != expected:
            raise ValueError(f"{directory / name} is damaged or changed; prepare the model again")
    file = open_blocks(directory, blocks)
    for layer in blocks:
        block = torch.empty(layer.block_bytes, dtype=torch.uint8)
        for expert in range(len(layer.checksums)):
            file.read(layer.offset(expert), block, torch.uint8)
            layer.require_intact(directory / BLOCKS, expert, zlib.crc32(block.numpy().data))
    return sum(len(layer.checksums) for layer in blocks)


def file_checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            found = zlib.crc32(piece, found)
    return found
