"""Experts whose matrices lie apart or have other names, as kernels read them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.source import Source
from runtime.weights.store import ExpertStore

Parameters = dict[str, Tensor]


def fused(source: Source) -> Source:
    """The same model with its experts fused, where they are of a kind in `PARTED` and plain."""
    kinds, store = {layer.kind for layer in source.layers}, source.store
    if len(kinds) != 1 or not kinds <= PARTED.keys() or isinstance(store, FusedStore):
        return source
    if any(map(store.coding, range(len(source.layers)))):
        return source
    return source._replace(store=FusedStore(store, kinds.pop()))


def as_model(source: Source, parameters: Parameters) -> Parameters:
    """Parameters of one expert of a source that was `fused`, as the model has them: views."""
    return source.store.parted(parameters) if isinstance(source.store, FusedStore) else parameters


def _dbrx(parameters: Parameters) -> Parameters:
    """w1 and v1, gate and up, and w2: [I, H] each."""
    gate, up = parameters["gate_up_proj"].chunk(2)
    return {"mlp.w1": gate, "mlp.v1": up, "mlp.w2": parameters["down_proj"].mT}


def _aria(parameters: Parameters) -> Parameters:
    """fc1 [H, 2I] and fc2 [I, H] of Aria under transformers 5.17."""
    return {
        "fc1.weight": parameters["gate_up_proj"].mT, "fc2.weight": parameters["down_proj"].mT
    }  # fmt: skip


def _jetmoe(parameters: Parameters) -> Parameters:
    """As kernels have them, under other names."""
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    return {"input_linear.weight": gate_up, "output_linear.weight": down}


PARTED = {"dbrx": _dbrx, "aria": _aria, "jetmoe": _jetmoe}
"""Views of fused parameters by the names of a kind of container, and in its shapes."""
DOWN = {"dbrx": "mlp.w2", "aria": "fc2.weight", "jetmoe": "output_linear.weight"}
"""The down projection of each kind."""
ACROSS = "dbrx", "aria"
"""Kinds that keep it as [I, H], where the others have [H, I]."""


class FusedStore(ExpertStore):
    """The experts of `store`, under the names and in the shapes of kernels. kind: of `PARTED`."""

    def __init__(self, store: ExpertStore, kind: str) -> None:
        self._store, self._kind, self.parted = store, kind, PARTED[kind]
        self.owns_experts, self.loss, self.advice = store.owns_experts, store.loss, store.advice

    def specs(self, layer: int) -> Specs:
        own = self._store.specs(layer)
        shape, dtype = own[DOWN[self._kind]]
        width, hidden = shape if self._kind in ACROSS else shape[::-1]
        shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
        return {name: Spec(shape, dtype) for name, shape in shapes.items()}

    def whole_specs(self, layer: int) -> Specs:
        return self._store.whole_specs(layer)

    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        self._store.read(layer, expert, self.parted(into))

    def release(self, layer: int) -> None:
        self._store.release(layer)

    def is_released(self, layer: int) -> bool:
        return self._store.is_released(layer)

    def refill(self, layer: int, read: Callable[[int], dict[str, Tensor]]) -> None:
        self._store.refill(layer, lambda expert: self.parted(read(expert)))

    def take(self, layer: int) -> None:
        self._store.take(layer)

    def restore(self, layer: int) -> None:
        self._store.restore(layer)
