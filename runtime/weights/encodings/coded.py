"""The parameters of an expert that are kept in codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.encoding import Encoding


class CodedMatrix(NamedTuple):
    """A parameter of one expert that is kept in codes."""

    encoding: Encoding
    shape: tuple[int, int]
    """[N, K]: rows of codes are always rows of the output."""
    transposed: bool
    """The model's parameter is [K, N]."""

    @property
    def parts(self) -> Specs:
        """Shapes and dtypes of its parts, by name."""
        return self.encoding.parts(self.shape)

    def decode(self, parts: Mapping[str, Tensor], into: Tensor) -> None:
        """Fill the model's parameter from the parts, on their device."""
        weights_NK = self.encoding.decode(parts, into.dtype)
        into.copy_(weights_NK.mT if self.transposed else weights_NK)


Coding = dict[str, CodedMatrix]
"""The coded parameters of the experts of a layer, by name; the others are as the model has them."""


def part_name(parameter: str, part: str) -> str:
    """The name of a part among the tensors of a stored expert."""
    return f"{parameter}.{part}"


def stored_specs(specs: Specs, coding: Coding) -> Specs:
    """Shapes and dtypes of an expert as it is stored.

    specs: its parameters as the model has them.
    """
    stored: dict[str, Spec] = {}
    for name, spec in specs.items():
        if name in coding:
            parts = coding[name].parts
            stored |= {part_name(name, part): parts[part] for part in parts}
        else:
            stored[name] = spec
    return stored


def bits_a_weight(coding: Coding) -> float:
    """Bits that a coded weight of an expert takes, its scales included."""
    stored = sum(spec.num_bytes for one in coding.values() for spec in one.parts.values())
    return 8 * stored / sum(rows * columns for rows, columns in (m.shape for m in coding.values()))


def decode_expert(stored: Mapping[str, Tensor], coding: Coding, into: Mapping[str, Tensor]) -> None:
    """Fill some of the model's parameters of an expert from its stored tensors."""
    for name, target in into.items():
        if name in coding:
            matrix = coding[name]
            parts = {part: stored[part_name(name, part)] for part in matrix.parts}
            matrix.decode(parts, target)
        else:
            target.copy_(stored[name])
