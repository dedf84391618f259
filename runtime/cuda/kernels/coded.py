"""A matrix kept in codes, as kernels see it: the places of its parts in a stored block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from runtime.weights.encodings.coded import CodedMatrix
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding

MXFP4, FP8, INT4, NVFP4 = range(4)
KINDS = {"mxfp4": MXFP4, "fp8-block": FP8, "int4-group": INT4, "nvfp4": NVFP4}
"""Encodings that kernels decode, by name."""
F32, BF16, F16, E8M0, E4M3 = range(5)
SCALE_FORMATS = {
    torch.float32: F32,
    torch.bfloat16: BF16,
    torch.float16: F16,
    torch.uint8: E8M0,
    torch.float8_e8m0fnu: E8M0,
    torch.float8_e4m3fn: E4M3,
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
    divides: bool
    """Global scales divide."""

    @staticmethod
    def of(encoding: Encoding, starts: Mapping[str, int]) -> Code:
        """The code of a matrix whose parts start at these bytes of a stored block."""
        (extra,) = [starts[name] for name in starts if name not in (CODES, SCALES)] or [-1]
        kind = KINDS[encoding.name]
        fixed = {MXFP4: torch.uint8, NVFP4: torch.float8_e4m3fn}
        scale = fixed[kind] if kind in fixed else getattr(encoding, "scale")  # noqa: B009
        return Code(
            kind, starts[CODES], starts[SCALES], extra, encoding.rows, encoding.columns,
            SCALE_FORMATS[scale], bool(getattr(encoding, "divides", False)),
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
