"""Experts read one by one from the safetensors files of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from routing.layers import MoELayer
from runtime.weights.files import DTYPES, CheckpointFiles
from runtime.weights.mapping import CheckpointMapping
from runtime.weights.store import SkeletonStore


class CheckpointStore(SkeletonStore):
    """A store that reads each expert from where it lies in a safetensors checkpoint.

    dtype: the dtype in which experts are handed out; None for the stored one.
    Raises ValueError, naming the tensor, when an expert is missing or has another shape.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        mapping: CheckpointMapping,
        meta_layers: list[MoELayer],
        layers: list[MoELayer],
        dtype: torch.dtype | None,
    ) -> None:
        self._files = files
        self._parameters = [mapping.parameters(layer) for layer in meta_layers]
        for parameters in self._parameters:
            for parameter in parameters.values():
                parameter.check(files)
        super().__init__(meta_layers, layers, dtype or DTYPES[files.entries[min(self.keys)].dtype])

    @property
    def keys(self) -> set[str]:
        """The keys of all checkpoint tensors that hold experts."""
        parameters = [one for of_layer in self._parameters for one in of_layer.values()]
        return {key for one in parameters for keys in one.keys.values() for key in keys}

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        for name, target in into.items():
            self._parameters[layer][name].read(self._files, expert, target)
