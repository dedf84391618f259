"""A prepared model compared with its checksums."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from runtime.weights.arena import expert_bytes
from runtime.weights.prepared.manifest import BLOCKS, read_file_checksums, read_manifest
from runtime.weights.prepared.store import open_blocks


def checksum(block: Tensor) -> int:
    """CRC-32 of a block, a uint8 tensor [bytes]."""
    return zlib.crc32(block.numpy().data)


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
