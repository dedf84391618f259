"""Experts read one by one from files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from routing.layers import MoELayer
from runtime.weights.arena import Spec, Specs
from runtime.weights.files import DTYPES, CheckpointFiles
from runtime.weights.mapping import Mapping
from runtime.weights.store import ExpertStore, expert_parameters, expert_part


class FileStore(ExpertStore):
    """Knows shapes and names; those below know where the bytes are.

    stock: the layers of the stock model on the meta device. layers: the live ones.
    """

    def __init__(self, stock: list[MoELayer], layers: list[MoELayer], dtype: torch.dtype) -> None:
        self.stock = stock
        self.layers = layers
        self.dtype = dtype
        self._names = [layer.container.names(layer.module) for layer in stock]
        self._shapes = [
            {path: parameter.shape for path, parameter in expert_parameters(layer).items()}
            for layer in stock
        ]

    def specs(self, layer: int) -> Specs:
        whole = {path: torch.empty(s, device="meta") for path, s in self._shapes[layer].items()}
        parts = expert_part(self.layers[layer], self._names[layer], whole, 0)
        return {name: Spec(tuple(part.shape), self.dtype) for name, part in parts.items()}

    def restore(self, layer: int) -> None:
        container = self.layers[layer]
        whole = {p: torch.zeros(s, dtype=self.dtype) for p, s in self._shapes[layer].items()}
        for expert in range(container.num_experts):
            self.read(layer, expert, expert_part(container, self._names[layer], whole, expert))
        for path, tensor in whole.items():
            holder, _, name = path.rpartition(".")
            setattr(container.module.get_submodule(holder), name, nn.Parameter(tensor))


class CheckpointStore(FileStore):
    """Reads experts from where they lie in a safetensors checkpoint.

    dtype: what experts are handed out in; None for what they are stored in.
    Raises ValueError, naming the tensor, when an expert is missing or has another shape.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        mapping: Mapping,
        stock: list[MoELayer],
        layers: list[MoELayer],
        dtype: torch.dtype | None,
    ) -> None:
        self._files = files
        self._sources = [mapping.sources(layer) for layer in stock]
        for sources in self._sources:
            for source in sources.values():
                source.check(files)
        super().__init__(stock, layers, dtype or DTYPES[files.entries[min(self.keys)].dtype])

    @property
    def keys(self) -> set[str]:
        """All tensors of the checkpoint that hold experts."""
        sources = [source for found in self._sources for source in found.values()]
        return {key for source in sources for keys in source.keys.values() for key in keys}

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        for name, target in into.items():
            self._sources[layer][name].read(self._files, expert, target)
