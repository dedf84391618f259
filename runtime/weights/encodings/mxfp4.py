"""mxfp4: numbers of 4 bits (e2m1), of which each 32 in a row share a power of two (e8m0)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings import nvfp4
from runtime.weights.encodings.blocks import decode_blocks
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.number_formats import (
    E8M0_BIAS,
    power_of_two,
    unpack_e2m1,
)
from runtime.weights.encodings.stored_matrix import Convert, StoredMatrix
from runtime.weights.encodings.stored_parts import (
    as_bytes,
    e8m0,
    require_dtype,
    require_matrix,
    require_shape,
    scale_key,
)
from runtime.weights.files import Entry

METHODS = ("mxfp4", "fp8", "compressed-tensors")
"""Quantisation methods whose checkpoints may have such matrices."""

BLOCKS, PACKED, WEIGHT = "_blocks", ".weight_packed", ".weight"


@dataclass(frozen=True, kw_only=True)
class MXFP4(Encoding):
    """e2m1 x 2^(scale - 127); the scale 255 counts as 2^128, as for `torch.ldexp`.

    codes   uint8 [N, K / 2]         the even column is the low half
    scales  uint8 [N, K / columns]
    """

    name: ClassVar[str] = "mxfp4"
    bits: ClassVar[int] = 4

    columns: int = 32

    def parts(self, shape: tuple[int, int]) -> Specs:
        self._require_whole(shape)
        rows, columns = shape
        return {
            CODES: Spec((rows, columns // 2), torch.uint8),
            SCALES: Spec((rows // self.rows, columns // self.columns), torch.uint8),
        }

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Exact in bfloat16 and float32, but for numbers beyond 2^128, which are infinite."""
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        halves = power_of_two(parts[SCALES].int() - (E8M0_BIAS + 1)).to(exact)  # of scales: finite
        doubled = partial(unpack_e2m1, dtype=exact, factor=2.0)
        return decode_blocks(self, parts[CODES], doubled, halves, dtype)


def find(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, StoredMatrix]:
    """The matrices in mxfp4, by the key that they would have unquantised.

    .._blocks [E, N, K / 32, 16] and .._scales    experts of gpt-oss, [E, K, N] in the model
    ...weight_packed and ..weight_scale           compressed-tensors
    ...weight int8 and its scale                  DeepSeek-V4, among matrices in fp8
    """
    method = quantization.get("quant_method")
    found = {}
    for key, entry in entries.items():
        if key.endswith(BLOCKS) and method == "mxfp4":
            found[key.removesuffix(BLOCKS)] = _stacked(key, entries)
        elif key.endswith(PACKED) and method == "compressed-tensors" and entry.dtype == "U8":
            if not nvfp4.is_packed(key, entries):
                found[key.removesuffix("_packed")] = _packed(key, entries)
        elif key.endswith(WEIGHT) and method == "fp8" and entry.dtype in ("I8", "F4"):
            found[key] = _packed(key, entries)
    return found


def _stacked(key: str, entries: Mapping[str, Entry]) -> StoredMatrix:
    blocks, scales = entries[key], scale_key(key, entries)
    require_dtype(key, blocks, "U8")
    require_dtype(scales, entries[scales], "U8", "F8_E8M0")
    if len(blocks.shape) != 4 or blocks.shape[3] != 16:
        raise ValueError(f"{key} has the shape {list(blocks.shape)} instead of [.., .., .., 16]")
    require_shape(scales, entries[scales], blocks.shape[:3])
    experts, rows, groups, _ = blocks.shape
    return StoredMatrix(
        encoding=MXFP4(),
        shape=(experts, rows, groups * 32),
        sources={CODES: key, SCALES: scales},
        transposed=True,
        convert=_conversion(scales),
    )


def _packed(key: str, entries: Mapping[str, Entry]) -> StoredMatrix:
    codes, scales = entries[key], scale_key(key, entries)
    require_matrix(key, codes)
    require_dtype(scales, entries[scales], "U8", "F8_E8M0")
    *stacked, rows, row_bytes = codes.shape
    require_shape(scales, entries[scales], (*stacked, rows, row_bytes // 16))
    return StoredMatrix(
        encoding=MXFP4(),
        shape=(*stacked, rows, row_bytes * 2),
        sources={CODES: key, SCALES: scales},
        convert=_conversion(scales),
    )


def _conversion(key: str) -> Convert:
    def convert(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {CODES: as_bytes(stored[CODES]).flatten(1), SCALES: e8m0(key, stored[SCALES])}

    return convert
