"""The parts of a coded matrix, read from a checkpoint into place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.files import DTYPES, OTHERS, CheckpointFiles

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
        """Fill the tensors of `into`, by part; their scales have the rows of `encoding`.

        What needs no conversion is read straight into its place. Raises ValueError, naming the
        tensor, for one whose content no encoding stands for.
        """
        stored = {part: self._stored(part, into.get(part)) for part in self.matrix.sources}
        try:
            parts = self.matrix.convert(stored)
        except ValueError as error:
            raise ValueError(f"{self.files.directory}: {error}") from error
        times = self.matrix.encoding.rows // encoding.rows
        for part, target in into.items():
            _put(parts[part], times, target)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K]."""
        encoding = even(self.matrix)
        rows, columns = self.matrix.shape[-2:]
        parts = empty(encoding.parts((rows, columns)))
        self.read(encoding, parts)
        return encoding.decode(parts, dtype)

    def _stored(self, part: str, target: Tensor | None) -> Tensor:
        """A part of one matrix as it is stored, in the memory of `target` if it fits."""
        key = self.matrix.sources[part]
        entry = self.files.entries[key]
        is_stacked = len(self.matrix.shape) == STACKED and part not in self.matrix.shared
        shape = entry.shape[1:] if is_stacked else entry.shape
        spec = Spec(shape, (DTYPES | OTHERS)[entry.dtype])
        tensor = _room_in(target, spec)
        if tensor is None:
            tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self.files.read(key, self.expert * tensor.numel() if is_stacked else 0, tensor)
        return tensor


def empty(specs: Specs) -> dict[str, Tensor]:
    """New tensors in host memory, with any content."""
    return {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}


def _room_in(target: Tensor | None, spec: Spec) -> Tensor | None:
    """The memory of `target` as a tensor of `spec`; None if its bytes do not fit."""
    if target is None or target.device.type != "cpu" or target.nbytes != spec.num_bytes:
        return None
    if not target.is_contiguous() or target.data_ptr() % spec.dtype.itemsize:
        return None
    return target.reshape(-1).view(torch.uint8).view(spec.dtype).view(spec.shape)


def _put(part: Tensor, times: int, target: Tensor) -> None:
    """Copy a part into `target`, each of its rows `times` times if it has fewer."""
    if part.dtype.itemsize == target.dtype.itemsize == 1:
        part = part.contiguous().view(target.dtype)  # bytes stay as they are
    if part.numel() != target.numel():
        part = part.reshape(-1, *target.shape[1:]).repeat_interleave(times, 0)[: len(target)]
    part = part.reshape(target.shape)
    if part.data_ptr() == target.data_ptr() and part.is_contiguous() and part.dtype == target.dtype:
        return  # it was read there
    shares = part.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
    target.copy_(part.clone() if shares else part)
