"""Encodings of benchmarked experts, by the names that benchmarks give them."""

from __future__ import annotations

import math
from collections.abc import Callable

from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4

BLOCK = 128
"""Rows and columns that share a scale in fp8."""

ENCODINGS: dict[str, Callable[[int, int], Encoding]] = {
    "mxfp4": lambda _rows, _columns: MXFP4(),
    "int4": lambda _rows, _columns: Int4Group(columns=32),
    "int4-128": lambda _rows, columns: Int4Group(columns=math.gcd(columns, 128)),
    "int4-32-zeros": lambda _rows, _columns: Int4Group(columns=32, zeros=True),
    "nvfp4": lambda rows, _columns: NVFP4(rows=rows),
    "nvfp4-divides": lambda rows, _columns: NVFP4(rows=rows, divides=True),
    "fp8": lambda rows, _columns: FP8Block(rows=math.gcd(rows, BLOCK), columns=BLOCK),
    "fp8-row": lambda _rows, columns: FP8Block(columns=columns),
}
"""Each takes [N, K] of one matrix, of which gate and up are two."""
