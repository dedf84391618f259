"""The conversion of checkpoint tensors into the parameters of one expert.

transformers' own conversion mapping says which checkpoint tensors make up a parameter. Where it
only stacks them, they are copied straight into the slot. Any other conversion runs the library's
own operations over the tensors of one expert.

    on disk                                              parameter
    experts.3.gate_proj, experts.3.up_proj  [I, H] each  gate_up_proj[3]  [2I, H]
    experts.gate_up_proj  [E, 2I, H]                     gate_up_proj[3]  [2I, H]
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from runtime.weights.arena import Spec
from runtime.weights.encodings.coded import CodedMatrix
from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.files import DTYPES
from runtime.weights.quantised.coded_files import CodedFiles
from runtime.weights.quantised.refusals import describe, without_scales
from runtime.weights.quantised.stacking import is_alike, stacked

STACKING: tuple[list[tuple[str, int | None]], ...] = (
    [],
    [("MergeModulelist", 0)],
    [("MergeModulelist", 0), ("Concatenate", 1)],
    [("Concatenate", 1)],
    [("ErnieFuseAndSplitTextVisionExperts", None)],
)
"""Operations whose result for one expert is its tensors, stacked along the first dimension."""


@dataclass(frozen=True, kw_only=True)
class CheckpointParameter:
    """One parameter of the experts of an MoE layer, and the checkpoint tensors it is made of."""

    name: str
    """Name of the parameter in the model."""
    spec: Spec
    """Shape and dtype of the parameter of one expert."""
    shape: tuple[int, ...]
    """Shape of the model's parameter: of all experts, or of one if each expert is a module."""
    keys: dict[str, list[str]]
    """Checkpoint keys by source pattern, in the order of stacking: one key for each expert, or that
    of one fused tensor."""
    per_expert: bool
    """True if each expert has a tensor of its own."""
    converter: Any
    """transformers' `WeightConverter`, or None."""
    config: Any
    """Configuration of the model."""

    @cached_property
    def is_stacked(self) -> bool:
        """True if the tensors are copied one below the other, without any computation."""
        operations = self.converter.operations if self.converter else []
        return [(type(op).__name__, getattr(op, "dim", None)) for op in operations] in STACKING

    def coded(self, files: CodedFiles) -> CodedMatrix | None:
        """The parameter of one expert in codes; None where it is not of codes of one kind, stacked.

        Raises ValueError, naming the tensor, for an expert that is coded unlike the others.
        """
        matrices = {key: files.matrices.get(key) for keys in self.keys.values() for key in keys}
        for keys in self.keys.values():
            _require_alike(files.directory, {key: matrices[key] for key in keys})
        if not self.is_stacked:
            return None
        return stacked([matrices[keys[0]] for keys in self.keys.values()], self.spec.shape)

    def read_parts(
        self, files: CodedFiles, expert: int, matrix: CodedMatrix, into: dict[str, Tensor]
    ) -> None:
        """Copy the coded parameter of `expert`, which is `matrix`, into tensors by part."""
        pieces = {part: target.unflatten(0, (len(self.keys), -1)) for part, target in into.items()}
        for piece, keys in enumerate(self.keys.values()):
            key, index = (keys[expert], 0) if self.per_expert else (keys[0], expert)
            targets = {part: targets[piece] for part, targets in pieces.items()}
            files.parts(key, index).read(matrix.encoding, targets)

    def read(self, files: CodedFiles, expert: int, target: Tensor) -> None:
        """Copy the parameter of `expert` into `target`, decoded."""
        if not self.is_stacked:
            target.copy_(self._convert(lambda keys: self._tensor(files, keys, expert, target)))
            return
        parts = target.unflatten(0, (len(self.keys), -1))
        for part, keys in zip(parts, self.keys.values(), strict=True):
            if self.per_expert:
                files.read(keys[expert], 0, part)
            else:
                files.read(keys[0], expert * part.numel(), part)

    def _tensor(self, files: CodedFiles, keys: list[str], expert: int, target: Tensor) -> Tensor:
        """The tensor of one expert; if fused, with a leading dimension of one expert."""
        if self.per_expert:
            return files.get(keys[expert], target.dtype)
        return files.rows(keys[0], expert, expert + 1, target.dtype)

    def _convert(self, fetch: Callable[[list[str]], Tensor]) -> Tensor:
        """Run the library's operations over the tensors of one expert."""
        tensors: dict[str, Any] = {pattern: [fetch(keys)] for pattern, keys in self.keys.items()}
        one = torch.empty(1, *self.spec.shape, device="meta")
        for operation in self.converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.name,
                model=SimpleNamespace(get_parameter=lambda _: one, config=self.config),
                config=self.config,
            )
        result = next(iter(tensors.values()))
        return (result[0] if isinstance(result, list) else result)[0]

    def check(self, files: CodedFiles) -> None:
        """Raise ValueError, naming the tensor, if one is missing or of another shape or dtype."""
        self._check_counts(files)
        for keys in self.keys.values():
            expected = self._expected_shape(files, keys)
            for key in keys:
                entry = files.entries[key]
                if entry.shape != expected:
                    raise ValueError(
                        f"{files.directory}: {key} has shape {entry.shape}, but the model needs "
                        f"{expected}"
                    )
                if entry.dtype not in DTYPES:
                    raise ValueError(without_scales(files.directory, key, entry.dtype))
        keys_of_all = [key for keys in self.keys.values() for key in keys]
        formats = {files.entries[k].dtype: k for k in keys_of_all if k not in files.matrices}
        if len(formats) > 1:
            (one, first), (other, second), *_ = formats.items()
            raise ValueError(
                f"{files.directory} stores {first} as {one}, but {second} as {other}: its files "
                "are mixed; fetch or save the checkpoint again"
            )
        if not self.is_stacked:
            self._check_conversion(files)

    def _check_counts(self, files: CodedFiles) -> None:
        needed = max(len(keys) for keys in self.keys.values())
        if self.per_expert and self.converter:
            needed = self.shape[0]
        for pattern in self.converter.source_patterns if self.converter else self.keys:
            keys = self.keys.get(pattern, [])
            if len(keys) != needed:
                absent = _first_absent(keys, needed)
                raise ValueError(
                    f"{files.directory}: the experts {self.name} need {needed} tensors {pattern}, "
                    f"but there are {len(keys)}" + (f"; {absent} is missing" if absent else "")
                )

    def _expected_shape(self, files: CodedFiles, keys: list[str]) -> tuple[int, ...]:
        """The shape that each of `keys` must have.

        It is an equal part of the parameter, or the shape of the first for `_check_conversion`.
        """
        if not self.is_stacked:
            first = files.entries[keys[0]].shape
            return first if self.per_expert else (self.shape[0], *first[1:])
        parts = len(self.keys)
        if self.per_expert:
            return (self.spec.shape[0] // parts, *self.spec.shape[1:])
        experts = self.shape[: len(self.shape) - len(self.spec.shape)]
        rows = self.shape[len(experts)] // parts
        return (*experts, rows, *self.shape[len(experts) + 1 :])

    def _check_conversion(self, files: CodedFiles) -> None:
        def fetch(keys: list[str]) -> Tensor:
            shape = files.entries[keys[0]].shape
            return torch.empty(shape if self.per_expert else (1, *shape[1:]), device="meta")

        key = next(iter(self.keys.values()))[0]
        try:
            shape = tuple(self._convert(fetch).shape)
        except Exception as error:  # the library's operations raise anything
            names = [type(operation).__name__ for operation in self.converter.operations]
            raise ValueError(
                f"{files.directory}: {key} and those like it cannot be converted one expert at a "
                f"time ({', '.join(names)}: {error!r:.100}); load the model whole, and pass it"
            ) from error
        if shape != self.spec.shape:
            raise ValueError(
                f"{files.directory}: {key} and those like it make an expert of shape {shape}, but "
                f"the model needs {self.spec.shape}"
            )


def _require_alike(directory: Path, matrices: dict[str, StoredMatrix | None]) -> None:
    """Raise ValueError unless the tensors of all experts are coded in the same way."""
    (first, expected), *others = matrices.items()
    for key, matrix in others:
        if not is_alike(expected, matrix):
            raise ValueError(
                f"{directory}: {key} is stored as {describe(matrix)}, but {first} as "
                f"{describe(expected)}: the experts of a layer have to be of one kind; quantise "
                "them alike, or load the unquantised model"
            )


def _first_absent(keys: list[str], num_experts: int) -> str | None:
    """The first key that `keys` lacks, by the number of the expert in their names."""
    for expert in range(num_experts):
        name = re.sub(r"\.\d+\.(?!.*\.\d+\.)", f".{expert}.", keys[0]) if keys else None
        if name not in keys:
            return name
    return None
