"""The experts of a checkpoint, encoded as they are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from routing.layers import MoELayer
from runtime.conversion.activations import LayerInputs, moments
from runtime.conversion.settings import CALIBRATED
from runtime.cuda.memory.kernel_layout import KernelLayout, layout_of
from runtime.weights.arena import Specs
from runtime.weights.encodings.coded import CodedMatrix, Coding, bits_a_weight, part_name
from runtime.weights.encodings.encoders.grid import Encoder
from runtime.weights.encodings.encoders.rounding import feedback, nearest, search
from runtime.weights.gated_experts import UNGATED
from runtime.weights.store import ExpertStore

MATRICES = {"gate_up_proj": 2, "down_proj": 1}
"""The parameters that are encoded, and how many matrices each stacks."""


class Rounding(NamedTuple):
    """The way to round, and where."""

    encoder: Encoder
    name: str
    """One of `conversion.settings.ROUNDINGS`."""
    device: torch.device


class EncodedStore(ExpertStore):
    """A store that encodes the experts of another one, each when it is read.

    inputs: recorded for each layer; empty where there is nothing to calibrate on.
    Raises ValueError, naming the layer, for experts that the encoding cannot take.
    """

    def __init__(
        self,
        store: ExpertStore,
        layers: list[MoELayer],
        rounding: Rounding,
        inputs: list[LayerInputs],
    ) -> None:
        self._store, self._layers = store, layers
        self._rounding, self._inputs = rounding, inputs
        self._layouts = [_layout(layer, store.specs(i)) for i, layer in enumerate(layers)]
        self._coding = [self._coding_of(index) for index in range(len(layers))]

    def _coding_of(self, index: int) -> Coding:
        layout, coding = self._layouts[index], {}
        shapes = {
            "gate_up_proj": (2 * layout.width, layout.hidden),
            "down_proj": (layout.hidden, layout.width),
        }
        for name, stacked in MATRICES.items():
            try:
                encoding = self._rounding.encoder.encoding(shapes[name], stacked)
            except ValueError as error:
                raise ValueError(
                    f"{self._layers[index].name}.{name} cannot be in "
                    f"{self._rounding.encoder.name}: {error}"
                ) from error
            coding[name] = CodedMatrix(encoding, shapes[name], layout.transposed)
        return coding

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def bits(self) -> float:
        """Bits of a coded weight, its scales included."""
        return bits_a_weight(self._coding[0])

    def specs(self, layer: int) -> Specs:
        return self._store.specs(layer)

    def whole_specs(self, layer: int) -> Specs:
        return self._store.whole_specs(layer)

    def coding(self, layer: int) -> Coding:
        return self._coding[layer]

    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        raise AssertionError("an encoded expert is stored, not run")

    def restore(self, layer: int) -> None:
        raise AssertionError("an encoded expert is stored, not run")

    @torch.no_grad()
    def read_stored(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        """Raises ValueError for weights that are no finite numbers."""
        specs, coding = self._store.specs(layer), self._coding[layer]
        plain = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        self._store.read(layer, expert, plain)
        wide = self._wide(layer, plain)
        for name, tensor in wide.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{self._layers[layer].name}, expert {expert}: {name} has weights that are no "
                    "finite numbers"
                )
        moments_of = self._moments(layer, expert, wide)
        for name, tensor in plain.items():
            if name not in coding:
                into[name].copy_(tensor)
                continue
            for part, value in self._encode(wide[name], coding[name], moments_of.get(name)).items():
                into[part_name(name, part)].copy_(value)

    def _wide(self, layer: int, plain: dict[str, Tensor]) -> dict[str, Tensor]:
        """An expert in float32 on the device, its weights [out, in]."""
        transposed = self._layouts[layer].transposed
        return {
            name: (tensor.mT if transposed and tensor.dim() == 2 else tensor)
            .to(self._rounding.device, torch.float32)
            .contiguous()
            for name, tensor in plain.items()
        }

    def _moments(self, layer: int, expert: int, wide: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._inputs or self._rounding.name not in CALIBRATED:
            return {}
        inputs_TH = self._inputs[layer].of_expert(expert)
        return moments(inputs_TH, wide, self._layouts[layer]) if len(inputs_TH) else {}

    def _encode(
        self, weights_NK: Tensor, matrix: CodedMatrix, moments_KK: Tensor | None
    ) -> dict[str, Tensor]:
        grid = self._rounding.encoder.grid(weights_NK, matrix.encoding)
        name = self._rounding.name
        if name == "nearest":
            rounded = nearest(weights_NK, grid)
        elif name == "search" or moments_KK is None:
            rounded = search(weights_NK, grid)
        elif name == "weighted":
            rounded = search(weights_NK, grid, moments_KK.diagonal())
        else:
            rounded = feedback(weights_NK, grid, moments_KK)
        return grid.pack(rounded.numbers_NK, rounded.scales_NB)


def _layout(layer: MoELayer, specs: Specs) -> KernelLayout:
    found = layout_of(layer, specs)
    if not isinstance(found, str) and found.activation == UNGATED:
        found = "no encoding is made of experts without a gate"
    if isinstance(found, str):
        raise ValueError(f"the experts of {layer.name} cannot be encoded: {found}")
    return found
