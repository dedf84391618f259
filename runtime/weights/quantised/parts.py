"""The parts of a coded matrix, read from a checkpoint into place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.stored_matrix import StoredMatrix, unchanged
from runtime.weights.files import CheckpointFiles

STACKED = 3
"""Dimensions of a matrix that is stored once for all experts."""


def even(matrix: StoredMatrix) -> Encoding:
    """The encoding of `matrix`, with as few rows a scale as divide its rows."""
    return with_rows(matrix.encoding, gcd(matrix.encoding.rows, matrix.shape[-2]))


def with_rows(encoding: Encoding, rows: int) -> Encoding:
    """The same encoding, whose scales are repeated so that each is that of `rows` rows."""
    return encoding if encoding.rows == rows else replace(encoding, rows=rows)


class PartReader(NamedTuple):
    """The parts of one matrix of a checkpoint: those of `expert`, where all share a tensor."""

    files: CheckpointFiles
    matrix: StoredMatrix
    expert: int

    def read(self, encoding: Encoding, into: Mapping[str, Tensor]) -> None:
        """Fill the tensors of `into`, by part; their scales have the rows of `encoding`."""
        matrix = self.matrix
        if matrix.convert is unchanged and encoding.rows == matrix.encoding.rows:
            for part, target in into.items():
                self.files.read_raw(matrix.sources[part], self.expert, target)
            return
        parts = matrix.convert({part: self._stored(key) for part, key in matrix.sources.items()})
        times = matrix.encoding.rows // encoding.rows
        for part, target in into.items():
            found = _as_stored(parts[part], target.dtype)
            if found.numel() != target.numel():
                found = found.reshape(-1, *target.shape[1:]).repeat_interleave(times, 0)
                found = found[: len(target)]
            target.copy_(found.reshape(target.shape))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K]."""
        encoding = even(self.matrix)
        rows, columns = self.matrix.shape[-2:]
        parts = {
            part: torch.empty(spec.shape, dtype=spec.dtype)
            for part, spec in encoding.parts((rows, columns)).items()
        }
        self.read(encoding, parts)
        return encoding.decode(parts, dtype)

    def _stored(self, key: str) -> Tensor:
        if len(self.matrix.shape) < STACKED:
            return self.files.get(key)
        return self.files.rows(key, self.expert, self.expert + 1)[0]


def _as_stored(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as they are where `dtype` names bytes, as of scales that are exponents."""
    same_size = part.dtype.itemsize == dtype.itemsize == 1
    return part.contiguous().view(dtype) if same_size else part
