"""nvfp4: numbers of 4 bits (e2m1), of which each 16 in a row share a scale of 8 bits (e4m3).

All scales of a matrix share one more, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.blocks import decode_blocks
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.number_formats import unpack_e2m1
from runtime.weights.encodings.stored_matrix import Convert, StoredMatrix
from runtime.weights.encodings.stored_parts import (
    require_dtype,
    require_matrix,
    require_shape,
    require_there,
)
from runtime.weights.files import Entry

METHODS = ("modelopt", "compressed-tensors")
"""Quantisation methods whose checkpoints may have such matrices."""

GLOBAL_SCALES = "global_scales"
WEIGHT, PACKED = ".weight", ".weight_packed"
STACKED = 3
"""Dimensions of the codes of all experts in one tensor."""


@dataclass(frozen=True, kw_only=True)
class NVFP4(Encoding):
    """e2m1 x (scale x global scale), or, if it divides, e2m1 x (scale / global scale).

    codes          uint8 [N, K / 2]                 the even column is the low half
    scales         float8_e4m3fn [N, K / columns]
    global_scales  float32 [N / rows]               each that of all rows of a matrix

    Both operations are in float32, and the product is rounded once, to the number format of the
    weights. compressed-tensors decompresses to the same bits in bfloat16, if the global scale has
    the shape [1], as it writes it; one without dimensions makes it divide in bfloat16. It knows
    no other format than bfloat16. (ModelOpt multiplies, compressed-tensors divides.)
    """

    name: ClassVar[str] = "nvfp4"
    bits: ClassVar[int] = 4

    columns: int = 16
    divides: bool = False
    """Scales are divided by the global one."""

    def parts(self, shape: tuple[int, int]) -> Specs:
        self._require_whole(shape)
        rows, columns = shape
        return {
            CODES: Spec((rows, columns // 2), torch.uint8),
            SCALES: Spec((rows, columns // self.columns), torch.float8_e4m3fn),
            GLOBAL_SCALES: Spec((rows // self.rows,), torch.float32),
        }

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        scales = parts[SCALES].float()
        global_scales = parts[GLOBAL_SCALES].repeat_interleave(self.rows, 0)[:, None]
        scales = scales / global_scales if self.divides else scales * global_scales
        by_row = replace(self, rows=1)  # only the global scales are shared by rows
        return decode_blocks(
            by_row, parts[CODES], partial(unpack_e2m1, dtype=torch.float32), scales, dtype
        )


class Names(NamedTuple):
    """The keys of the tensors that are one matrix, or one of each expert."""

    codes: str
    scales: str
    global_scales: str

    def require_there(self, entries: Mapping[str, Entry]) -> None:
        """Raise ValueError, naming it, for one that is missing or in another number format."""
        for key in self[1:]:
            require_there(key, entries, self.codes)
        require_dtype(self.scales, entries[self.scales], "F8_E4M3")
        require_dtype(self.global_scales, entries[self.global_scales], "F32")


def find(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, StoredMatrix]:
    """The matrices in nvfp4, by the key that they would have unquantised.

    ..weight [N, K / 2] and ..weight_scale, ..weight_scale_2               ModelOpt
    ..gate_up_proj [E, N, K / 2], or [E, K / 2, N] of a parameter
        [E, K, N], and .._weight_scale, .._weight_scale_2                  ModelOpt, stacked experts
    ..weight_packed [N, K / 2] and ..weight_scale, ..weight_global_scale   compressed-tensors

    Scales of activations do not count.
    """
    if quantization["quant_method"] == "compressed-tensors":
        return _find_packed(entries)
    return _find_modelopt(entries)


def _find_packed(entries: Mapping[str, Entry]) -> dict[str, StoredMatrix]:
    found = {}
    for key, entry in entries.items():
        if key.endswith(PACKED) and entry.dtype == "U8" and is_packed(key, entries):
            weight = key.removesuffix("_packed")
            names = Names(key, f"{weight}_scale", f"{weight}_global_scale")
            found[weight] = _stored(names, entries, divides=True)
    return found


def is_packed(key: str, entries: Mapping[str, Entry]) -> bool:
    """True for packed codes of compressed-tensors in nvfp4 and not in mxfp4."""
    weight = key.removesuffix("_packed")
    scales = entries.get(f"{weight}_scale")
    return f"{weight}_global_scale" in entries or (scales is not None and scales.dtype == "F8_E4M3")


def _find_modelopt(entries: Mapping[str, Entry]) -> dict[str, StoredMatrix]:
    found = {}
    for key, entry in entries.items():
        if key.endswith("pre_quant_scale"):
            raise ValueError(
                f"{key} scales activations before they are multiplied, which is not supported; use "
                "a checkpoint that was quantised without AWQ and SmoothQuant"
            )
        if entry.dtype == "U8" and key.endswith((WEIGHT, "_proj")):
            prefix = key if key.endswith(WEIGHT) else f"{key}_weight"
            names = Names(key, f"{prefix}_scale", f"{prefix}_scale_2")
            found[key] = _stored(names, entries, divides=False)
    return found


def _stored(names: Names, entries: Mapping[str, Entry], *, divides: bool) -> StoredMatrix:
    require_matrix(names.codes, entries[names.codes])
    names.require_there(entries)
    codes, scales = entries[names.codes].shape, entries[names.scales].shape
    *stacked, rows, row_bytes = codes
    transposed = bool(stacked) and tuple(scales) == (*stacked, rows // 8, row_bytes)
    if transposed:
        rows, row_bytes = row_bytes, rows
    else:
        require_shape(names.scales, entries[names.scales], (*stacked, rows, row_bytes // 8))
    ones = _global_scales(names.global_scales, entries, stacked)
    of_experts = _is_of_experts(entries[names.global_scales], stacked)
    return StoredMatrix(
        encoding=NVFP4(rows=rows // ones, divides=divides),
        shape=(*stacked, rows, row_bytes * 2),
        sources={CODES: names.codes, SCALES: names.scales, GLOBAL_SCALES: names.global_scales},
        transposed=transposed,
        shared=frozenset({GLOBAL_SCALES} if stacked and not of_experts else ()),
        convert=_conversion(transposed),
    )


def _is_of_experts(entry: Entry, stacked: list[int]) -> bool:
    return tuple(entry.shape[:1]) == tuple(stacked)


def _global_scales(key: str, entries: Mapping[str, Entry], stacked: list[int]) -> int:
    """The number of global scales of one matrix: stacked gate and up may have one each."""
    shape = list(entries[key].shape)
    most = 1
    if stacked and _is_of_experts(entries[key], stacked):
        shape, most = shape[1:], 2
    count = torch.Size(shape).numel()
    if not 1 <= count <= most:
        raise ValueError(
            f"{key} has the shape {list(entries[key].shape)} instead of one number for each "
            "matrix; fetch the checkpoint again"
        )
    return count


def _conversion(transposed: bool) -> Convert:
    def convert(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {part: stored[part] for part in (CODES, SCALES)}
        if transposed:
            parts = {part: tensor.mT.contiguous() for part, tensor in parts.items()}
        return parts | {GLOBAL_SCALES: stored[GLOBAL_SCALES].reshape(-1)}

    return convert
