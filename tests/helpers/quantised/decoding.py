"""The weights of a quantised directory, decoded by the runtime's own encodings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.encodings.table import find_all
from runtime.weights.files import CheckpointFiles


def find_matrices(directory: Path) -> tuple[CheckpointFiles, dict[str, StoredMatrix]]:
    """The files of `directory`, and the coded matrices in them."""
    config = json.loads((directory / "config.json").read_text())
    files = CheckpointFiles(directory)
    return files, find_all(files.entries, config["quantization_config"])


def parts_of(files: CheckpointFiles, matrix: StoredMatrix) -> Iterator[dict[str, Tensor]]:
    """The parts of each matrix; one, or that of each expert."""
    stored = {part: files.get(key) for part, key in matrix.sources.items()}
    if len(matrix.shape) == 2:
        yield matrix.convert(stored)
    else:
        for expert in range(matrix.shape[0]):
            of_expert = {part: stored[part][expert] for part in stored.keys() - matrix.shared}
            yield matrix.convert(stored | of_expert)


def decode(files: CheckpointFiles, matrix: StoredMatrix, dtype: torch.dtype) -> Tensor:
    """The weights as an unquantised checkpoint has them."""
    every = [matrix.encoding.decode(parts, dtype) for parts in parts_of(files, matrix)]
    weights = torch.stack(every) if len(matrix.shape) == 3 else every[0]
    return weights.mT.contiguous() if matrix.transposed else weights


def decode_all(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All coded weights of `directory`, by the keys that they would have unquantised."""
    files, matrices = find_matrices(directory)
    return {key: decode(files, matrix, dtype) for key, matrix in matrices.items()}
