"""The tensors of a quantised checkpoint under the names and shapes of an unquantised one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.files import DTYPES, SINGLE, CheckpointFiles, Entry
from runtime.weights.quantised.parts import STACKED, PartReader
from runtime.weights.quantised.quantization import find_all

NAMES = {dtype: name for name, dtype in DTYPES.items()}
WEIGHT = ".weight"
KEPT = ("weight", "bias")
"""Tensors beside coded ones of which a module is made. Others only describe its quantisation."""


class CodedFiles:
    """A checkpoint whose coded tensors are one tensor of weights each, decoded when it is read.

    single: the file to open in a directory without an index of shards.
    quantization: as the directory describes it; None if it is not quantised.
    stored: the files of the directory, where they are open already.
    Raises ValueError as `CheckpointFiles` does, and, naming the tensor, for codes without their
    scales, or of another shape.
    """

    def __init__(
        self,
        directory: Path,
        single: str = SINGLE,
        quantization: Mapping[str, Any] | None = None,
        stored: CheckpointFiles | None = None,
    ) -> None:
        self.directory = directory
        self.stored = stored or CheckpointFiles(directory, single)
        """The tensors that there are in the files."""
        self.matrices: dict[str, StoredMatrix] = {}
        """The coded ones, by the key that the weights have in an unquantised checkpoint."""
        if quantization is not None:
            self.matrices = find_all(directory, self.stored.entries, quantization)
        hidden = _used(self.stored.entries, self.matrices)
        self.entries = {k: e for k, e in self.stored.entries.items() if k not in hidden}
        self.entries |= {key: self._entry(matrix) for key, matrix in self.matrices.items()}

    def _entry(self, matrix: StoredMatrix) -> Entry:
        first = self.stored.entries[next(iter(matrix.sources.values()))]
        return first._replace(dtype=NAMES[matrix.dtype], shape=tuple(matrix.weight_shape))

    def stored_keys(self, keys: Iterable[str]) -> set[str]:
        """The tensors in the files that stand for `keys`."""
        chosen = set(keys)
        coded = {key: matrix for key, matrix in self.matrices.items() if key in chosen}
        return (chosen - coded.keys()) | _used(self.stored.entries, coded)

    def get(self, key: str, dtype: torch.dtype) -> Tensor:
        """The tensor `key`; if it is coded, decoded to `dtype`."""
        matrix = self.matrices.get(key)
        if matrix is None:
            return self.stored.get(key)
        if len(matrix.shape) < STACKED:
            return self._decode(key, 0, dtype)
        return self.rows(key, 0, matrix.shape[0], dtype)

    def rows(self, key: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of the tensor `key`; if it is coded, decoded to `dtype`."""
        if key not in self.matrices:
            return self.stored.rows(key, start, stop)
        return torch.stack([self._decode(key, index, dtype) for index in range(start, stop)])

    def read(self, key: str, start: int, target: Tensor) -> None:
        """Fill `target` with elements of the tensor `key`, beginning at element `start`.

        A coded matrix is only read whole.
        """
        if key in self.matrices:
            target.copy_(self._decode(key, start // target.numel(), target.dtype))
        else:
            self.stored.read(key, start, target)

    def parts(self, key: str, expert: int = 0) -> PartReader:
        """The parts of a coded tensor: of `expert`, if it is one of all experts."""
        return PartReader(self.stored, self.matrices[key], expert)

    def _decode(self, key: str, index: int, dtype: torch.dtype) -> Tensor:
        weights_NK = self.parts(key, index).decode(dtype)
        return weights_NK.mT if self.matrices[key].transposed else weights_NK


class StoredTensor(NamedTuple):
    """A tensor in a file, which is read when it is indexed: as transformers takes its weights."""

    files: CodedFiles
    key: str
    dtype: torch.dtype = torch.float32
    """To which codes are decoded: the number format of the model, as transformers does, also where
    a parameter is kept in a wider one."""

    def __getitem__(self, index: Any) -> Tensor:  # type: ignore[override]
        return self.files.get(self.key, self.dtype)[index]

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' slices give it."""
        return list(self.files.entries[self.key].shape)

    def get_dtype(self) -> str:
        """The dtype by its name in safetensors."""
        return self.files.entries[self.key].dtype


def _used(entries: Mapping[str, Entry], matrices: Mapping[str, StoredMatrix]) -> set[str]:
    """The tensors in the files that stand for `matrices`, or only describe how they are coded."""
    sources = {key for matrix in matrices.values() for key in matrix.sources.values()}
    modules = {key.removesuffix(WEIGHT) for key in matrices if key.endswith(WEIGHT)}
    parted = (key.rpartition(".") for key in entries)
    beside = {
        f"{module}.{name}" for module, _, name in parted if module in modules and name not in KEPT
    }
    beside |= {f"{key}_input_scale" for key in matrices} & entries.keys()  # of stacked experts
    return sources | beside
