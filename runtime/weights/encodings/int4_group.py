"""int4-group: whole numbers of 4 bits, of which some neighbours in a row share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from runtime.weights.arena import Spec, Specs
from runtime.weights.encodings.blocks import decode_blocks
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.integers import packed, qweight
from runtime.weights.encodings.integers.packed import MIDDLE, ZEROS, Integers
from runtime.weights.encodings.number_formats import unpack_int4
from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.files import Entry

FINDERS = {
    "compressed-tensors": packed.find,
    "gptq": qweight.find_gptq,
    "awq": qweight.find_awq,
}
METHODS = tuple(FINDERS)
"""Quantisation methods whose checkpoints may have such matrices."""


@dataclass(frozen=True, kw_only=True)
class Int4Group(Encoding):
    """(code - zero) x scale, rounded in the number format of the scales.

    codes   uint8 [N, K / 2]         0..15; the even column is the low half
    scales  `scale` [N, K / columns]
    zeros   uint8 [N, K / columns]   the codes that stand for 0; without `zeros` all are 8
    """

    name: ClassVar[str] = "int4-group"
    bits: ClassVar[int] = 4

    scale: torch.dtype = torch.bfloat16
    """bfloat16, float16 or float32."""
    zeros: bool = False
    """Each group has its own zero."""

    def parts(self, shape: tuple[int, int]) -> Specs:
        if self.rows != 1:
            raise self._unfit(shape)
        self._require_whole(shape)
        rows, columns = shape
        groups = (rows, columns // self.columns)
        zeros = {ZEROS: Spec(groups, torch.uint8)} if self.zeros else {}
        codes = Spec((rows, columns // 2), torch.uint8)
        return {CODES: codes, SCALES: Spec(groups, self.scale)} | zeros

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        unpack = partial(unpack_int4, dtype=self.scale, zero=0 if self.zeros else MIDDLE)
        zeros = parts[ZEROS].to(self.scale) if self.zeros else None
        return decode_blocks(self, parts[CODES], unpack, parts[SCALES], dtype, zeros)


def find(entries: Mapping[str, Entry], quantization: Mapping[str, Any]) -> dict[str, StoredMatrix]:
    """The matrices in int4, by the key that they would have unquantised.

    ..weight_packed [N, K / 8] and ..weight_scale, ..weight_zero_point    compressed-tensors
    ..qweight [K / 8, N] and ..scales, ..qzeros, ..g_idx                  GPTQ
    ..qweight [K, N / 8] and ..scales, ..qzeros                           AWQ
    """
    found = FINDERS[quantization["quant_method"]](entries, quantization)
    return {key: _stored(integers) for key, integers in found.items()}


def _stored(integers: Integers) -> StoredMatrix:
    return StoredMatrix(
        encoding=Int4Group(columns=integers.columns, scale=integers.scale, zeros=integers.zeros),
        shape=integers.shape,
        sources=integers.sources,
        convert=integers.convert,
    )
