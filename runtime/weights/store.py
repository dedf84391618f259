"""The host tier: where the experts live when they are not in a slot. Read-only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from routing.layers import MoELayer
from runtime.weights.arena import Spec, Specs


class ExpertStore(ABC):
    """Hands out the parameters of any expert of any MoE layer."""

    owns_experts = False
    """Whether the experts exist nowhere else: they must go back into the model."""

    @abstractmethod
    def specs(self, layer: int) -> Specs:
        """Shapes and dtypes of one expert of `layer`."""

    @abstractmethod
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        """Copy one expert into the given tensors (a slot's views)."""

    def release(self, layer: int) -> None:  # noqa: B027 - a store that owns no memory keeps its bytes
        """Free the memory of the experts of `layer`, which somebody else holds now."""

    def refill(self, layer: int, read: Callable[[int], dict[str, Tensor]]) -> None:  # noqa: B027
        """Undo `release`: read(expert) gives one expert's parameters, on any device."""

    def is_released(self, layer: int) -> bool:
        """Whether `refill` has to follow."""
        return False

    def take(self, layer: int) -> None:  # noqa: B027 - a store of its own bytes has nothing to take
        """Take the experts' parameters out of the container of `layer`."""

    @abstractmethod
    def restore(self, layer: int) -> None:
        """Give the experts container of `layer` all its parameters back."""


class ModuleStore(ExpertStore):
    """The experts of a module that was given whole: its own tensors, taken out of it.

    The very same parameters come back with `restore`, then on the CPU, where the host tier is.
    """

    owns_experts = True

    def __init__(self, layers: list[MoELayer]) -> None:
        self._layers = layers
        self._names = [layer.container.names(layer.module) for layer in layers]
        self._parameters = [expert_parameters(layer) for layer in layers]
        self._released: dict[int, list[tuple[int, ...]]] = {}

    def specs(self, layer: int) -> Specs:
        return {
            name: Spec(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._expert(layer, 0).items()
        }

    def _expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        return expert_part(self._layers[layer], self._names[layer], self._parameters[layer], expert)

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        for name, tensor in self._expert(layer, expert).items():
            into[name].copy_(tensor)

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

    def restore(self, layer: int) -> None:
        for path, parameter in self._parameters[layer].items():
            self._set(layer, path, parameter)

    def _set(self, layer: int, path: str, parameter: nn.Parameter | None) -> None:
        owner, _, name = path.rpartition(".")
        self._layers[layer].module.get_submodule(owner)._parameters[name] = parameter


def expert_parameters(layer: MoELayer) -> dict[str, nn.Parameter]:
    """The parameters of a container that belong to its experts, by path within it."""
    container = layer.container
    names = container.names(layer.module)
    paths = dict.fromkeys(
        container.path(name, expert) for expert in range(layer.num_experts) for name in names
    )
    return {path: layer.module.get_parameter(path) for path in paths}


def expert_part(
    layer: MoELayer, names: list[str], parameters: Mapping[str, Tensor], expert: int
) -> dict[str, Tensor]:
    """Views of one expert's parameters, by name; `parameters` are by path."""
    container = layer.container
    return {
        name: container.part(parameters[container.path(name, expert)], expert, layer.num_experts)
        for name in names
    }
