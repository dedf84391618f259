"""fp8-block: numbers of 8 bits (e4m3), of which blocks of rows and columns share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.blocks import decode_blocks
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.number_formats import (
    E8M0_BIAS,
    power_of_two,
    unpack_e4m3,
)
from runtime.weights.encodings.stored_matrix import Convert, StoredMatrix, unchanged
from runtime.weights.encodings.stored_parts import (
    block_of,
    e8m0,
    repeat_rows,
    require_dtype,
    require_matrix,
    scale_key,
    whole_rows,
)
from runtime.weights.files import Entry

METHODS = ("fp8", "mxfp8", "compressed-tensors", "modelopt")
"""Quantisation methods whose checkpoints may have such matrices."""

SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float32,
    "U8": torch.uint8,
    "F8_E8M0": torch.uint8,
}
"""The number format in which scales are kept, by that of the checkpoint; the values are equal."""

WHOLE = 1 << 40
"""Columns of a block that is as wide as any matrix."""


@dataclass(frozen=True, kw_only=True)
class FP8Block(Encoding):
    """e4m3 x scale, multiplied in float32 and rounded once.

    codes   float8_e4m3fn [N, K]
    scales  `scale` [N / rows, ceil(K / columns)]
    """

    name: ClassVar[str] = "fp8-block"
    bits: ClassVar[int] = 8

    scale: torch.dtype = torch.float32
    """float32, bfloat16, or uint8 for powers of two (e8m0), of which 255 is infinite."""
    product: torch.dtype = torch.float32
    """A narrower format to which the product is rounded first."""

    def parts(self, shape: tuple[int, int]) -> Specs:
        rows, columns = shape
        if rows % self.rows:
            raise ValueError(f"{rows} rows are no multiple of the {self.rows} that share a scale")
        blocks = (rows // self.rows, -(-columns // self.columns))
        return {CODES: Spec(shape, torch.float8_e4m3fn), SCALES: Spec(blocks, self.scale)}

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        scales = parts[SCALES]
        if self.scale == torch.uint8:
            scales = power_of_two(scales.int() - E8M0_BIAS)
        first = dtype if self.product == torch.float32 else self.product
        return decode_blocks(self, parts[CODES], unpack_e4m3, scales.float(), first).to(dtype)


_encoding = cache(FP8Block)
"""One object for each that there is: a large checkpoint has a hundred thousand matrices."""


def find(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, StoredMatrix]:
    """The matrices in fp8, by their key.

    ..weight [N, K]             and ..weight_scale_inv, ..weight_scale, ..scale or ..qscale_weight
    ..gate_up_proj [E, N, K]    and .._scale_inv or .._scale

    Scales are [N / rows, K / columns], [N, 1], [N] or a single one; of activations there may be
    others, which do not count.
    """
    block = configured_block(quantization)
    found = {}
    for key, entry in entries.items():
        if entry.dtype == "F8_E5M2":
            raise ValueError(f"{key} is stored as F8_E5M2, which no encoding has")
        if entry.dtype == "F8_E4M3" and not is_scale(key):
            found[key] = _stored(key, entries, quantization, block)
    return found


def is_scale(key: str) -> bool:
    """True for the name of scales."""
    return key.endswith(("scale", "scale_inv", "scale_2", "scales"))


def configured_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block that a quantisation names for matrices in fp8; None for several or none."""
    method = quantization.get("quant_method")
    if method in ("fp8", "mxfp8") and "weight_block_size" in quantization:
        return _pair("weight_block_size", quantization["weight_block_size"])
    if method == "mxfp8":
        return (1, 32)
    groups = (quantization.get("config_groups") or {}).values()
    schemes = [group.get("weights") or {} for group in groups]
    blocks = {_block(scheme) for scheme in schemes if scheme.get("num_bits") == 8}
    return blocks.pop() if len(blocks) == 1 else None


def _block(scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block of a scheme of compressed-tensors."""
    match scheme.get("strategy"):
        case "channel":
            return (1, WHOLE)
        case "group":
            return _pair("group_size", [1, scheme.get("group_size")])
        case "block":
            return _pair("block_structure", scheme.get("block_structure"))
    return None


def _pair(name: str, size: Any) -> tuple[int, int] | None:
    """Rows and columns of a block. Raises ValueError, naming the field, for what is none."""
    match size:
        case None | []:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(f"{name} of the quantisation is {size}, which is no block")


def _stored(
    key: str,
    entries: Mapping[str, Entry],
    quantization: Mapping[str, Any],
    configured: tuple[int, int] | None,
) -> StoredMatrix:
    codes, scales = entries[key], scale_key(key, entries)
    require_matrix(key, codes)
    require_dtype(scales, entries[scales], *SCALE_DTYPES)
    rows, columns = codes.shape[-2:]
    grid = _grid(scales, entries[scales], codes.shape)
    block = block_of(scales, grid, (rows, columns), configured)
    shared = whole_rows(rows, block[0])
    return StoredMatrix(
        encoding=_encoding(
            rows=shared,
            columns=block[1],
            scale=SCALE_DTYPES[entries[scales].dtype],
            product=_product(key, entries[scales], quantization),
        ),
        shape=codes.shape,
        sources={CODES: key, SCALES: scales},
        convert=_conversion(scales, entries[scales], grid, (block[0], shared, rows)),
    )


def _grid(key: str, entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of one matrix; a single one is [1, 1], one a row [N, 1]."""
    *stacked, rows, _ = shape
    grid = tuple(entry.shape)
    if stacked:
        if grid[:1] != tuple(stacked):
            raise ValueError(f"{key} has the shape {list(grid)} for {stacked[0]} experts")
        grid = grid[1:]
    if len(grid) == 4 and grid[1] == grid[3] == 1:  # as ModelOpt writes blocks
        grid = grid[::2]
    if grid in ((), (1,)):
        return (1, 1)
    return (rows, 1) if grid == (rows,) else grid


def _product(key: str, scales: Entry, quantization: Mapping[str, Any]) -> torch.dtype:
    """The library of compressed-tensors multiplies in the format of the scales, but for experts."""
    narrow = {"BF16": torch.bfloat16, "U8": torch.bfloat16, "F16": torch.float16}
    if quantization.get("quant_method") != "compressed-tensors" or ".experts." in key:
        return torch.float32
    return narrow.get(scales.dtype, torch.float32)


def _conversion(
    key: str, entry: Entry, grid: tuple[int, ...], heights: tuple[int, int, int]
) -> Convert:
    """heights: rows of a stored block, of a canonical one, and of the matrix."""
    as_stored = entry.dtype not in ("F16", "U8", "F8_E8M0") and heights[0] == heights[1]
    if as_stored and grid == entry.shape[-2:]:
        return unchanged

    def convert(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        scales = stored[SCALES].reshape(grid)
        if SCALE_DTYPES[entry.dtype] == torch.uint8:
            scales = e8m0(key, scales)
        elif entry.dtype == "F16":
            scales = scales.float()
        return stored | {SCALES: repeat_rows(scales, *heights)}

    return convert
