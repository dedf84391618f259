"""The code of a matrix: how kernels find its parts in a stored block, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from runtime.cuda.kernels.coded.decoding import BF16, E4M3, E8M0, F16, F32, FP8, INT4, MXFP4, NVFP4
from runtime.weights.encodings.coded import CodedMatrix
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding

KINDS = {
    "mxfp4": MXFP4.value,
    "fp8-block": FP8.value,
    "int4-group": INT4.value,
    "nvfp4": NVFP4.value,
}
"""Encodings that kernels decode, by name."""
SCALE_FORMATS = {
    torch.float32: F32.value,
    torch.bfloat16: BF16.value,
    torch.float16: F16.value,
    torch.uint8: E8M0.value,
    torch.float8_e8m0fnu: E8M0.value,
    torch.float8_e4m3fn: E4M3.value,
}
EIGHT = 8
"""Codes that are decoded together: neighbours in a row, which share their scale."""


class Code(NamedTuple):
    """A coded matrix in a stored block; a compile-time constant of kernels."""

    kind: int
    """One of KINDS."""
    codes: int
    """Byte at which the codes start in the block, a multiple of 128; so for the other parts."""
    scales: int
    extra: int
    """Zeros (int4) or global scales (nvfp4); -1 where there are none."""
    rows: int
    """Rows that share a scale (nvfp4: a global scale)."""
    columns: int
    """Columns that share a scale."""
    scale: int
    """One of SCALE_FORMATS."""
    product: int
    """The number format to which code x scale is rounded before it becomes a weight."""
    divides: bool
    """Global scales divide."""

    @staticmethod
    def of(encoding: Encoding, starts: Mapping[str, int]) -> Code:
        """The code of a matrix whose parts start at these bytes of a stored block."""
        extra = [at for name, at in starts.items() if name not in (CODES, SCALES)]
        kind = KINDS[encoding.name]
        own = {MXFP4.value: torch.uint8, NVFP4.value: torch.float8_e4m3fn}.get(kind)
        scale = getattr(encoding, "scale", own)
        product = getattr(encoding, "product", scale if kind == INT4.value else torch.float32)
        return Code(
            kind, starts[CODES], starts[SCALES], *(extra or [-1]), encoding.rows, encoding.columns,
            SCALE_FORMATS[scale], SCALE_FORMATS[product], bool(getattr(encoding, "divides", False)),
        )  # fmt: skip


def reason_against(matrix: CodedMatrix) -> str | None:
    """Why kernels cannot decode a matrix; None if they can."""
    encoding, width = matrix.encoding, matrix.shape[1]
    if encoding.name not in KINDS:
        return f"no kernel decodes {encoding.name}"
    if width % EIGHT or (encoding.columns % EIGHT and encoding.columns < width):
        return (
            f"kernels decode {EIGHT} codes at a time: rows of {width} in groups of "
            f"{encoding.columns} have no kernel"
        )
    return None
