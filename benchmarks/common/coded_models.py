"""Models of published shapes whose experts are random codes, made without ever being bfloat16.

The bytes of every expert are a window into a pool of random numbers, at a place of its own. So
experts of 60 GB take no memory beside the copies that are made of them, and a read costs a copy.
"""

from __future__ import annotations

import math
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from benchmarks.common.encodings import ENCODINGS
from benchmarks.common.shapes import SCALE, Shape, empty_model, fill_model, shape_named
from routing.inspect_model import topology_of
from routing.layers import MoELayer, find_moe_layers
from runtime.weights.arena import Spec, expert_bytes
from runtime.weights.encodings.coded import CodedMatrix, Coding, decode_expert
from runtime.weights.encodings.encoding import CODES, SCALES
from runtime.weights.source import Source
from runtime.weights.store import SkeletonStore, expert_parameters

PLACES = 1 << 22
"""Places of a pool at which an expert may begin."""
STEP = 1_000_003
"""Distance from expert to expert; a prime."""
RMS_FP8, RMS_INT4, RMS_E2M1 = 64.0, 4.6, 2.93
"""Typical size of a code."""
NVFP4_SCALE = 32.0
E8M0 = 120
"""The scale 2^-7."""


PLAIN = "bf16"
DRAWN = ("mxfp4", "int4", "int4-128", "nvfp4", "fp8")
"""Encodings of whole models, of which `draw` knows how large scales are."""


def check_encoding(name: str) -> None:
    """Raise ValueError for a name that is neither `bf16` nor one of `DRAWN`."""
    if name != PLAIN and name not in DRAWN:
        raise ValueError(f"encoding={name!r} is not one of {PLAIN}, {', '.join(DRAWN)}")


class CodedStore(SkeletonStore):
    """Experts of random codes; in bfloat16, of random weights."""

    def __init__(
        self, meta_layers: list[MoELayer], layers: list[MoELayer], encoding: str, seed: int
    ) -> None:
        super().__init__(meta_layers, layers, torch.bfloat16)
        self._encoding = encoding
        self._seed = seed
        self._pools: dict[tuple[str, torch.dtype], Tensor] = {}

    def coding(self, layer: int) -> Coding:
        if self._encoding == PLAIN:
            return {}
        meta = self.meta_layers[layer]
        transposed = bool(getattr(meta.module, "is_transposed", meta.kind == "llama4"))
        matrices = {name: s for name, s in self.specs(layer).items() if len(s.shape) == 2}
        return {name: self._matrix(name, spec.shape, transposed) for name, spec in matrices.items()}

    def _matrix(self, name: str, shape: tuple[int, ...], transposed: bool) -> CodedMatrix:
        rows, columns = shape[::-1] if transposed else shape
        stacked = 2 if name.startswith("gate_up") else 1
        encoding = ENCODINGS[self._encoding](rows // stacked, columns)
        return CodedMatrix(encoding, (rows, columns), transposed)

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        stored = {
            name: torch.empty(spec.shape, dtype=spec.dtype)
            for name, spec in self.stored_specs(layer).items()
        }
        self.read_stored(layer, expert, stored)
        decode_expert(stored, self.coding(layer), into)

    @torch.no_grad()
    def read_stored(self, layer: int, expert: int, into: dict[str, Tensor]) -> None:
        place = (layer * self.layers[layer].num_experts + expert) * STEP % PLACES
        specs = self.stored_specs(layer)
        for name, target in into.items():
            window = self._pool(name, specs[name])[place : place + target.numel()]
            target.copy_(window.view(specs[name].shape))

    def _pool(self, name: str, spec: Spec) -> Tensor:
        key = name, spec.dtype
        size = PLACES + math.prod(spec.shape)
        if key not in self._pools or len(self._pools[key]) < size:
            generator = torch.Generator().manual_seed(self._seed + crc32(name.encode()))
            self._pools[key] = draw(self._encoding, name, spec.dtype, size, generator)
        return self._pools[key]


def draw(
    encoding: str, name: str, dtype: torch.dtype, size: int, generator: torch.Generator
) -> Tensor:
    """Random numbers for one part of an expert, so that its weights are as large as usual."""
    part = name.rpartition(".")[2]
    if part == CODES and dtype == torch.uint8:
        return torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
    if part == CODES:
        codes = torch.empty(size).normal_(0, RMS_FP8, generator=generator)
        return codes.clamp_(-448, 448).to(dtype)
    if part == SCALES and dtype == torch.uint8:
        return torch.randint(E8M0 - 1, E8M0 + 2, (size,), generator=generator, dtype=torch.uint8)
    if part == SCALES:
        middle = _middle_scale(encoding)
        scales = torch.empty(size).uniform_(middle / 2, middle * 1.5, generator=generator)
        return scales.to(dtype)
    if part == "zeros":
        return torch.randint(6, 10, (size,), generator=generator, dtype=dtype)
    if part == "global_scales":
        return torch.full((size,), SCALE / RMS_E2M1 / NVFP4_SCALE, dtype=dtype)
    return torch.empty(size, dtype=dtype).normal_(0, SCALE, generator=generator)


def _middle_scale(encoding: str) -> float:
    if encoding == "fp8":
        return SCALE / RMS_FP8
    return NVFP4_SCALE if encoding == "nvfp4" else SCALE / RMS_INT4


def coded_source(shape: Shape, encoding: str, device: torch.device, *, seed: int = 0) -> Source:
    """A model of this shape without its experts, all else drawn, and the store of its experts.

    Raises ValueError for an unknown encoding.
    """
    check_encoding(encoding)
    meta, live = empty_model(shape), empty_model(shape)
    meta_layers, layers = find_moe_layers(meta), find_moe_layers(live)
    for layer in layers:
        for path in expert_parameters(layer):
            owner, _, name = path.rpartition(".")
            layer.module.get_submodule(owner)._parameters[name] = None
    store = CodedStore(meta_layers, layers, encoding, seed)
    return Source(fill_model(live, device, seed=seed), topology_of(meta), layers, store)


@cache
def coded_bytes(shape: str, encoding: str) -> int:
    """Bytes of all experts of a shape's model in this encoding."""
    layers = find_moe_layers(empty_model(shape_named(shape)))
    store = CodedStore(layers, layers, encoding, 0)
    specs = [store.stored_specs(index) for index in range(len(layers))]
    return sum(expert_bytes(s) * x.num_experts for s, x in zip(specs, layers, strict=True))
