"""Experts in codes: the kernels' results and decoded blocks, by Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cache.policies import LRU
from runtime.cuda.decode import experts_call as experts
from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from tests.helpers.device_twins import Twin, routes

EXPERTS, TOP_K = 4, 2
E8M0, BF16, FP16, FP32 = torch.uint8, torch.bfloat16, torch.float16, torch.float32
Make = Callable[[int, int], Encoding]
ENCODINGS: dict[str, Make] = {
    "mxfp4": lambda n, k: MXFP4(),
    "mxfp4 in blocks of rows": lambda n, k: MXFP4(rows=4, columns=8),
    "fp8 in blocks": lambda n, k: FP8Block(rows=gcd(n, 16), columns=64),
    "fp8 with bf16 scales": lambda n, k: FP8Block(rows=gcd(n, 16), columns=16, scale=BF16),
    "fp8 in narrow products": lambda n, k: FP8Block(columns=k, product=BF16),
    "fp8 by rows": lambda n, k: FP8Block(columns=k),
    "fp8 by matrices": lambda n, k: FP8Block(rows=n, columns=k),
    "mxfp8": lambda n, k: FP8Block(columns=32, scale=E8M0),
    "int4": lambda n, k: Int4Group(columns=32),
    "int4 in fp16": lambda n, k: Int4Group(columns=16, scale=FP16),
    "int4 in fp32": lambda n, k: Int4Group(columns=k, scale=FP32, zeros=True),
    "int4 with zeros": lambda n, k: Int4Group(columns=32, zeros=True),
    "int4 in groups of 8": lambda n, k: Int4Group(columns=8, zeros=True),
    "int4 in groups of 24": lambda n, k: Int4Group(columns=24 if k % 24 == 0 else 8),
    "nvfp4": lambda n, k: NVFP4(rows=n),
    "nvfp4 that divides": lambda n, k: NVFP4(rows=n, divides=True),
}
"""Of a matrix [N, K]."""


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "FETCHERS", 2)


def twin_of(name: str, batch: int, policy: Any = LRU, num_slots: int = 4, **layout: Any) -> Twin:
    given = {"hidden": 64, "width": 32, "dtype": BF16} | layout
    return Twin(
        policy(1, EXPERTS), num_layers=1, num_experts=EXPERTS, top_k=TOP_K, num_slots=num_slots,
        batch=batch, encoding=ENCODINGS[name], **given,
    )  # fmt: skip


def inputs(twin: Twin, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    import numpy as np

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, twin.layout.hidden, generator=generator).to(twin.layout.dtype)
    weights = torch.rand(batch, TOP_K, generator=generator).to(twin.layout.dtype)
    return x, routes(np.random.default_rng(seed), batch, EXPERTS, TOP_K), weights


def error_of(twin: Twin, batch: int) -> float:
    given = inputs(twin, batch)
    y, expected = twin.call(0, *given), twin.expected(0, *given)
    assert y.dtype == twin.layout.dtype
    return float((y.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ENCODINGS)
def test_experts_in_codes_compute_what_their_decoded_weights_do(name: str, batch: int) -> None:
    assert error_of(twin_of(name, batch), batch) < 1e-2
