"""Experts whose gate and up projections lie apart, as kernels read them: one above the other."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.source import Source
from runtime.weights.store import ExpertStore

GATE, UP, DOWN = "mlp.w1", "mlp.v1", "mlp.w2"
"""DBRX's matrices of one expert, [I, H] each."""


def fused(source: Source) -> Source:
    """The same model with all its experts fused, where they are DBRX's."""
    apart = all(layer.kind == "dbrx" for layer in source.layers)
    if not apart or isinstance(source.store, FusedStore):
        return source
    return source._replace(store=FusedStore(source.store))


def as_model(source: Source, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of one expert of a source that was `fused`, as the model has them: views."""
    return parted(parameters) if isinstance(source.store, FusedStore) else parameters


def parted(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of fused parameters, by the model's names."""
    gate, up = parameters["gate_up_proj"].chunk(2)
    return {GATE: gate, UP: up, DOWN: parameters["down_proj"].mT}


class FusedStore(ExpertStore):
    """The experts of `store`, which has DBRX's, under the names and in the shapes of kernels."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self.owns_experts, self.loss, self.advice = store.owns_experts, store.loss, store.advice

    def specs(self, layer: int) -> Specs:
        (width, hidden), dtype = self._store.specs(layer)[GATE]
        shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
        return {name: Spec(shape, dtype) for name, shape in shapes.items()}

    def whole_specs(self, layer: int) -> Specs:
        return self._store.whole_specs(layer)

    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        self._store.read(layer, expert, parted(into))

    def release(self, layer: int) -> None:
        self._store.release(layer)

    def is_released(self, layer: int) -> bool:
        return self._store.is_released(layer)

    def refill(self, layer: int, read: Callable[[int], dict[str, Tensor]]) -> None:
        self._store.refill(layer, lambda expert: parted(read(expert)))

    def take(self, layer: int) -> None:
        self._store.take(layer)

    def restore(self, layer: int) -> None:
        self._store.restore(layer)
