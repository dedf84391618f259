"""Experts read one by one from where they lie in a safetensors checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from routing.layers import MoELayer
from runtime.arena import Spec, Specs
from runtime.conversion import Sources
from runtime.files import CheckpointFiles
from runtime.mapping import Mapping
from runtime.store import ExpertStore


class CheckpointStore(ExpertStore):
    """Reads experts from a checkpoint directory, on demand.

    stock: the layers of the stock model on the meta device, for shapes. layers: the live ones.
    Raises ValueError, naming the tensor, when an expert is missing or has another shape.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        mapping: Mapping,
        stock: list[MoELayer],
        layers: list[MoELayer],
        dtype: torch.dtype,
    ) -> None:
        self._files = files
        self._layers = layers
        self._dtype = dtype
        self._sources = [mapping.sources(layer) for layer in stock]
        for sources in self._sources:
            for source in sources.values():
                source.check(files)

    def specs(self, layer: int) -> Specs:
        return {
            name: Spec(source.spec.shape, self._dtype)
            for name, source in self._sources[layer].items()
        }

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        for name, target in into.items():
            self._sources[layer][name].read(self._files, expert, target)

    def restore(self, layer: int) -> None:
        for name, source in self._sources[layer].items():
            path_of = self._layers[layer].container.path
            if path_of(name, 0) == path_of(name, 1):
                self._set(layer, path_of(name, 0), self._whole(layer, source))
            else:
                for expert in range(self._layers[layer].num_experts):
                    whole = torch.empty(source.shape, dtype=self._dtype)
                    source.read(self._files, expert, whole)
                    self._set(layer, path_of(name, expert), whole)

    def _whole(self, layer: int, source: Sources) -> Tensor:
        """A parameter of all experts, rows of parameter-free ones included."""
        whole = torch.empty(source.shape, dtype=self._dtype)
        num_parts = len(whole) // source.num_rows
        for index in range(num_parts):
            part = self._layers[layer].container.part(whole, index, num_parts)
            source.read(self._files, index, part)
        return whole

    def _set(self, layer: int, path: str, tensor: Tensor) -> None:
        holder, _, name = path.rpartition(".")
        setattr(self._layers[layer].module.get_submodule(holder), name, nn.Parameter(tensor))
