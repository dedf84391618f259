"""The host tier: a read-only store of the experts that are in no slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from routing.layers import MoELayer
from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.coded import Coding, stored_specs
from runtime.weights.packed.packed_blocks import PackedBlocks


class ExpertStore(ABC):
    """The parameters of every expert of every MoE layer, one expert at a time."""

    owns_experts = False
    """True if the experts exist nowhere else, so that they must go back into the model."""
    loss: str | None = None
    """A line about experts that are not the original model's any more; None where they are."""
    shared_as: str | None = None
    """The name under which processes on this machine share one copy of the experts in pinned
    memory; None: each has its own."""
    advice: str | None = None
    """What would make these experts load faster on a GPU, where something would."""

    @abstractmethod
    def specs(self, layer: int) -> Specs:
        """Shapes and dtypes of one expert of `layer`."""

    def coding(self, layer: int) -> Coding:
        """The parameters of the experts of `layer` that are kept in codes; none by default."""
        return {}

    def stored_specs(self, layer: int) -> Specs:
        """Shapes and dtypes of one expert of `layer` as it is stored: parts of coded parameters."""
        return stored_specs(self.specs(layer), self.coding(layer))

    @abstractmethod
    def whole_specs(self, layer: int) -> Specs:
        """Shapes and dtypes of the parameters that hold all experts of `layer`, by path."""

    @abstractmethod
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        """Copy one expert into the given tensors (views of a slot), decoded."""

    def read_stored(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        """Copy one expert as it is stored, into tensors of `stored_specs`."""
        assert not self.coding(layer), "a store of coded experts hands them out itself"
        self.read(layer, expert, into)

    def packed(self, layer: int) -> PackedBlocks | None:
        """The layout of the experts of `layer` where they are stored packed; they are handed out
        unpacked all the same.
        """
        return None

    def read_packed(self, layer: int, expert: int, into: Tensor) -> None:
        """Copy one expert as it is stored packed, to int16 [stored units] in host memory."""
        raise AssertionError("a store of packed experts hands them out itself")

    def release(self, layer: int) -> None:  # noqa: B027 - files occupy no memory
        """Free the memory of the experts of `layer`, of which another tier now has a copy."""

    def refill(self, layer: int, read: Callable[[int], dict[str, Tensor]]) -> None:  # noqa: B027
        """Undo `release`. read(expert) returns the parameters of one expert, on any device."""

    def is_released(self, layer: int) -> bool:
        """True if `refill` has to follow."""
        return False

    def take(self, layer: int) -> None:  # noqa: B027 - a model built without experts has none
        """Remove the experts' parameters from the container of `layer`."""

    @abstractmethod
    def restore(self, layer: int) -> None:
        """Put all parameters back into the experts container of `layer`."""


class ModuleStore(ExpertStore):
    """The experts of a module that was passed whole: its own tensors, removed from it.

    `restore` puts the very same parameters back. They are on the CPU then, as the host tier is.
    """

    owns_experts = True

    def __init__(self, layers: list[MoELayer]) -> None:
        self._layers = layers
        self._names = [layer.container.names(layer.module) for layer in layers]
        self._parameters = [expert_parameters(layer) for layer in layers]
        self._released: dict[int, list[tuple[int, ...]]] = {}
        self._versions: dict[int, int] = {}

    def specs(self, layer: int) -> Specs:
        return {
            name: Spec(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._expert(layer, 0).items()
        }

    def whole_specs(self, layer: int) -> Specs:
        parameters = self._parameters[layer]
        shapes = self._released.get(layer) or [tuple(p.shape) for p in parameters.values()]
        return {
            path: Spec(shape, parameter.dtype)
            for (path, parameter), shape in zip(parameters.items(), shapes, strict=True)
        }

    def _expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        return expert_part(self._layers[layer], self._names[layer], self._parameters[layer], expert)

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        """Raises ValueError for experts that were changed in place since they were taken."""
        if self._versions.get(layer) not in (None, self._count_changes(layer)):
            raise ValueError(
                f"experts of {self._layers[layer].name} were changed while they are offloaded, and "
                "slots hold some as they were; change them after model.expertflow.detach(), and "
                "load the model again"
            )
        for name, tensor in self._expert(layer, expert).items():
            into[name].copy_(tensor)

    def _count_changes(self, layer: int) -> int:
        """Changes in place so far; tensors made in inference mode cannot be changed elsewhere."""
        tensors = self._parameters[layer].values()
        return sum(tensor._version for tensor in tensors if not tensor.is_inference())

    def release(self, layer: int) -> None:
        self._released[layer] = [tuple(p.shape) for p in self._parameters[layer].values()]
        for parameter in self._parameters[layer].values():
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def is_released(self, layer: int) -> bool:
        return layer in self._released

    @torch.no_grad()
    def refill(self, layer: int, read: Callable[[int], dict[str, Tensor]]) -> None:
        shapes = self._released.pop(layer)
        for parameter, shape in zip(self._parameters[layer].values(), shapes, strict=True):
            parameter.data = torch.empty(shape, dtype=parameter.dtype)
        for expert in range(self._layers[layer].num_experts):
            into = self._expert(layer, expert)
            for name, tensor in read(expert).items():
                into[name].copy_(tensor)

    def take(self, layer: int) -> None:
        for path, parameter in self._parameters[layer].items():
            parameter.data = parameter.data.to("cpu")
            self._set(layer, path, None)
        self._versions[layer] = self._count_changes(layer)

    def restore(self, layer: int) -> None:
        self._versions.pop(layer, None)
        for path, parameter in self._parameters[layer].items():
            self._set(layer, path, parameter)

    def _set(self, layer: int, path: str, parameter: nn.Parameter | None) -> None:
        owner, _, name = path.rpartition(".")
        self._layers[layer].module.get_submodule(owner)._parameters[name] = parameter


class SkeletonStore(ExpertStore):
    """A store for a model that was built without its experts; subclasses say where the bytes are.

    meta_layers: the layers of the model on the meta device, which know the experts' shapes.
    layers: those of the live model.
    """

    def __init__(
        self, meta_layers: list[MoELayer], layers: list[MoELayer], dtype: torch.dtype
    ) -> None:
        self.meta_layers = meta_layers
        self.layers = layers
        self.dtype = dtype
        self._names = [layer.container.names(layer.module) for layer in meta_layers]
        self._shapes = [
            {path: parameter.shape for path, parameter in expert_parameters(layer).items()}
            for layer in meta_layers
        ]

    def bind(self, layers: list[MoELayer], dtype: torch.dtype) -> None:
        """Belong to the live model, whose layers and number format are now known."""
        self.layers, self.dtype = layers, dtype

    def specs(self, layer: int) -> Specs:
        whole = {path: torch.empty(s, device="meta") for path, s in self._shapes[layer].items()}
        parts = expert_part(self.layers[layer], self._names[layer], whole, 0)
        return {name: Spec(tuple(part.shape), self.dtype) for name, part in parts.items()}

    def whole_specs(self, layer: int) -> Specs:
        return {path: Spec(tuple(s), self.dtype) for path, s in self._shapes[layer].items()}

    def restore(self, layer: int) -> None:
        container = self.layers[layer]
        whole = {p: torch.zeros(s, dtype=self.dtype) for p, s in self._shapes[layer].items()}
        for expert in range(container.num_experts):
            self.read(layer, expert, expert_part(container, self._names[layer], whole, expert))
        for path, tensor in whole.items():
            holder, _, name = path.rpartition(".")
            setattr(container.module.get_submodule(holder), name, nn.Parameter(tensor))


class ConfiguredStore(SkeletonStore):
    """The sizes of experts by the configuration alone; there is nothing to read.

    quantization: how the weights are quantised, by which alone the bytes of codes are not known.
    """

    def __init__(
        self, layers: list[MoELayer], dtype: torch.dtype, quantization: Mapping[str, Any] | None
    ) -> None:
        super().__init__(layers, layers, dtype)
        self.quantization = quantization

    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        raise AssertionError("a plan reads no expert")


def expert_parameters(layer: MoELayer) -> dict[str, nn.Parameter]:
    """The parameters of a container that belong to its experts, by their path within it."""
    container = layer.container
    names = container.names(layer.module)
    paths = dict.fromkeys(
        container.path(name, expert) for expert in range(layer.num_experts) for name in names
    )
    return {path: layer.module.get_parameter(path) for path in paths}


def expert_part(
    layer: MoELayer, names: list[str], parameters: Mapping[str, Tensor], expert: int
) -> dict[str, Tensor]:
    """Views of the parameters of one expert, by name. `parameters` are keyed by path."""
    container = layer.container
    return {
        name: container.part(parameters[container.path(name, expert)], expert, layer.num_experts)
        for name in names
    }
