"""Experts of every encoding, in C beside the written-down order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runtime.cpu import CpuExperts, load_library
from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from tests.helpers.cpu_experts import FINITE, Case


def both(width: int, *encodings: Encoding) -> tuple[int, Encoding, Encoding]:
    """The width of experts, and the encodings of their matrices: one, or one of each."""
    return width, encodings[0], encodings[-1]


ENCODINGS: dict[str, tuple[int, Encoding, Encoding]] = {
    "mxfp4": (1440, MXFP4(), MXFP4()),
    "int4 by 32": (1440, Int4Group(columns=32), Int4Group(columns=48)),
    "int4 by 128, zeros": (
        1408,
        Int4Group(columns=128, zeros=True),
        Int4Group(columns=64, zeros=True),
    ),
    "int4 in float16": both(1440, Int4Group(columns=32, scale=torch.float16)),
    "int4 by rows": both(1440, *(Int4Group(columns=n, scale=torch.float32) for n in (1440, 384))),
    "fp8 in blocks": both(1440, FP8Block(rows=32, columns=128)),
    "fp8 by rows": both(1408, FP8Block(columns=1 << 40, scale=torch.bfloat16)),
    "fp8 by powers of two": both(1440, FP8Block(columns=32, scale=torch.uint8)),
    "nvfp4": (1440, NVFP4(rows=32), NVFP4(rows=16)),
    "nvfp4 that divides": (1440, NVFP4(rows=32, divides=True), NVFP4(rows=16, divides=True)),
}


def compare(case: Case, x_H: Tensor, least: float = 0.9) -> None:
    """C, with the help of two threads, gives the reference's bits; NaN where it has NaN.

    least: share of the outputs that must be finite, or there is little to compare.
    """
    library = load_library(case.shape)
    assert not isinstance(library, str), library
    blocks, ids = case.blocks(2), [1]
    with CpuExperts(library, case.shape, case.table(blocks), 2, cores=(-1, -1)) as service:
        answer_KH = service.ask(0, ids, x_H).clone().numpy()
    expected_KH = np.stack([case.expected(blocks[expert], x_H) for expert in ids])
    np.testing.assert_array_equal(np.isnan(answer_KH), np.isnan(expected_KH))
    kept_KH = ~np.isnan(expected_KH)
    assert np.isfinite(expected_KH).mean() >= least
    np.testing.assert_array_equal(
        answer_KH[kept_KH].view(np.int32), expected_KH[kept_KH].view(np.int32)
    )


def compare_all(case: Case) -> None:
    """With a usual vector, tiny and large ones, one with zeros and subnormals, and one of +-1e30,
    of which little remains finite.
    """
    usual = torch.randn(case.shape.hidden).bfloat16()
    compare(case, usual)
    compare(case, (usual * 1e-37).bfloat16())
    compare(case, (usual * 1e7).bfloat16())
    compare(case, case.sprinkled(usual.clone(), 0.02, FINITE[:-2]))
    compare(case, case.sprinkled(usual.clone(), 0.02, FINITE[-2:]), least=0)
