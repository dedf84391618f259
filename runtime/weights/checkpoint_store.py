"""Experts read one by one from the safetensors files of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from routing.layers import MoELayer
from runtime.weights.encodings.coded import Coding, part_name
from runtime.weights.files import DTYPES
from runtime.weights.mapping import CheckpointMapping
from runtime.weights.quantised.coded_files import CodedFiles
from runtime.weights.quantised.parts import empty
from runtime.weights.store import SkeletonStore


class CheckpointStore(SkeletonStore):
    """A store that reads each expert from where it lies in a safetensors checkpoint.

    dtype: the dtype in which experts are handed out; None for the stored one, which of codes is
        that of the configuration.
    Raises ValueError, naming the tensor, when an expert is missing or has another shape.
    """

    def __init__(
        self,
        files: CodedFiles,
        mapping: CheckpointMapping,
        meta_layers: list[MoELayer],
        layers: list[MoELayer],
        dtype: torch.dtype | None,
    ) -> None:
        self._files = files
        self._parameters = [mapping.parameters(layer) for layer in meta_layers]
        self._coding: list[Coding] = []
        for parameters in self._parameters:
            for parameter in parameters.values():
                parameter.check(files)
            coded = {name: parameter.coded(files) for name, parameter in parameters.items()}
            self._coding.append({name: one for name, one in coded.items() if one is not None})
        super().__init__(meta_layers, layers, dtype or self._stored_dtype(mapping.config))

    @property
    def keys(self) -> set[str]:
        """The keys of all checkpoint tensors that hold experts."""
        parameters = [one for of_layer in self._parameters for one in of_layer.values()]
        return {key for one in parameters for keys in one.keys.values() for key in keys}

    def _stored_dtype(self, config: Any) -> torch.dtype:
        key = min(self.keys)
        configured = config.dtype or config.get_text_config().dtype
        if key in self._files.matrices and isinstance(configured, torch.dtype):
            return configured
        return DTYPES[self._files.entries[key].dtype]

    def coding(self, layer: int) -> Coding:
        return self._coding[layer]

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        for name, target in into.items():
            matrix = self._coding[layer].get(name)
            if matrix is None:
                self._parameters[layer][name].read(self._files, expert, target)
            else:
                parts = empty(matrix.parts)
                self._parameters[layer][name].read_parts(self._files, expert, matrix, parts)
                matrix.decode(parts, target)

    @torch.no_grad()
    def read_stored(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters[layer].items():
            matrix = self._coding[layer].get(name)
            if matrix is None:
                parameter.read(self._files, expert, into[name])
            else:
                parts = {part: into[part_name(name, part)] for part in matrix.parts}
                parameter.read_parts(self._files, expert, matrix, parts)
