"""The host tier: where the experts live when they are not in a slot. Read-only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from routing.layers import MoELayer
from runtime.arena import Spec, Specs


class ExpertStore(ABC):
    """Hands out the parameters of any expert of any MoE layer."""

    @abstractmethod
    def specs(self, layer: int) -> Specs:
        """Shapes and dtypes of one expert of `layer`."""

    @abstractmethod
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        """Copy one expert into the given tensors (a slot's views)."""

    def take(self, layer: int) -> None:  # noqa: B027 - a store of its own bytes has nothing to take
        """Take the experts' parameters out of the container of `layer`."""

    @abstractmethod
    def restore(self, layer: int) -> None:
        """Give the experts container of `layer` all its parameters back."""


class ModuleStore(ExpertStore):
    """The experts of a module that was given whole: its own tensors, taken out of it.

    The very same parameters come back with `restore`, then on the CPU, where the host tier is.
    """

    def __init__(self, layers: list[MoELayer]) -> None:
        self._layers = layers
        self._names = [layer.container.names(layer.module) for layer in layers]
        self._parameters = [expert_parameters(layer) for layer in layers]

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
