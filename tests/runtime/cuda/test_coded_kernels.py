"""Experts in codes: the kernels' results and decoded blocks, by Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.cache.policies import LFU, LRU
from runtime.cuda.decode.experts import experts_call as experts
from runtime.cuda.kernels.coded import reason_against
from runtime.cuda.memory.expert_block import ExpertBlock
from runtime.cuda.memory.unpacking import decode_blocks
from runtime.weights.arena import Spec
from runtime.weights.encodings.coded import CodedMatrix, part_name
from runtime.weights.encodings.encoding import CODES, SCALES, Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from tests.helpers.device_twins import Twin, draw_parts, routes

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
    given: dict[str, Any] = {"hidden": 64, "width": 32, "dtype": BF16} | layout
    return Twin(
        policy(1, EXPERTS), num_layers=1, num_experts=EXPERTS, top_k=TOP_K, num_slots=num_slots,
        batch=batch, encoding=ENCODINGS[name], **given,
    )  # fmt: skip


def inputs(twin: Twin, batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
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


OSS = {"activation": "clamped_swiglu", "alternating": True, "has_bias": True}
SHAPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gpt-oss": ("mxfp4", 1, OSS),
    "gpt-oss, a batch": ("mxfp4", 17, OSS),
    "without a gate": ("mxfp4", 1, {"activation": "relu2"}),
    "without a gate, a batch": ("nvfp4", 2, {"activation": "relu2"}),
    "rows that fill no tile": ("mxfp4", 1, {"hidden": 96, "width": 32}),
    "rows that fill no tile, a batch": ("fp8 by rows", 2, {"hidden": 104, "width": 24}),
    "several tiles": ("nvfp4", 1, {"hidden": 160}),
    "several tiles of either matrix": ("int4 with zeros", 1, {"hidden": 96, "width": 160} | OSS),
    "fp16": ("mxfp4", 1, {"dtype": FP16}),
    "fp32": ("mxfp4", 2, {"dtype": FP32}),
    "int4 in fp32": ("int4", 1, {"dtype": FP32}),
}
"""Encoding, tokens and layout."""


@pytest.mark.parametrize("name", SHAPES)
def test_layouts_of_all_sizes_are_computed(name: str) -> None:
    encoding, batch, layout = SHAPES[name]
    limit = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}[layout.get("dtype", BF16)]
    twin = twin_of(encoding, batch, **layout)
    if batch == 1:
        twin.call._blocks = twin.call._blocks._replace(columns=64, down_columns=64)
    assert error_of(twin, batch) < limit


@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_are_bit_identical_whatever_is_resident(batch: int) -> None:
    outputs = []
    for policy, num_slots in [(LRU, 4), (LFU, TOP_K * batch)]:
        torch.manual_seed(1)
        twin = twin_of("int4", batch, policy, num_slots)
        outputs.append([twin.call(0, *inputs(twin, batch, seed)) for seed in (0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_ids_of_nobody_add_nothing_even_where_memory_is_not_finite(batch: int) -> None:
    twin = twin_of("mxfp4", batch)
    x, _, weights = inputs(twin, batch)
    twin.call._h.fill_(float("nan"))
    ids = torch.tensor([[3, 3], [-1, EXPERTS + 1]])[:batch]
    y = twin.call(0, x, ids, weights).float()
    expected = twin.expected(0, x, ids, weights)
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_code_that_is_not_a_number_spoils_its_experts_tokens(batch: int) -> None:
    twin = twin_of("fp8 in blocks", batch)
    codes = part_name("down_proj", CODES)
    twin.expert_block.stored_views(twin.layers[0])[codes].view(torch.uint8)[1, 5, 3] = 0xFF
    x, _, weights = inputs(twin, batch)
    y = twin.call(0, x, torch.tensor([[1, 0], [2, 3]])[:batch], weights)
    assert y[0].isnan().nonzero().tolist() == [[5]]
    assert y[1:].isfinite().all()


# ---------------------------------------------------------------------- decoded blocks


def decoded(block: ExpertBlock, stored_N: Tensor) -> dict[str, Tensor]:
    slots_SN = torch.stack([torch.zeros_like(stored_N), stored_N])
    to_RN = torch.full((1, block.units), 0x7FC1, dtype=torch.int16)
    decode_blocks(block, slots_SN, torch.tensor([1], dtype=torch.int32), to_RN)
    return {name: view[0] for name, view in block.views(to_RN).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether numbers are equal, signs of zeros too; NaN are all the same."""
    ints = {2: torch.int16, 4: torch.int32}[a.itemsize]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(ints), b[~nan].view(ints))


def block_in(encoding: Encoding, shape: tuple[int, int], dtype: torch.dtype) -> ExpertBlock:
    specs = {"matrix": Spec(shape, dtype), "bias": Spec(shape[:1], dtype)}
    return ExpertBlock(specs, coding={"matrix": CodedMatrix(encoding, shape, False)})


def assert_decodes(block: ExpertBlock, fill: Callable[[dict[str, Tensor]], None]) -> None:
    stored_N = torch.zeros(block.stored_units, dtype=torch.int16)
    stored = block.stored_views(stored_N)
    matrix = block.coding["matrix"]
    parts = {part: stored[part_name("matrix", part)] for part in matrix.parts}
    draw_parts(parts)
    fill(parts)
    stored["bias"].copy_(torch.randn(stored["bias"].shape))
    found = decoded(block, stored_N)
    expected = matrix.encoding.decode(parts, found["matrix"].dtype)
    assert same_bits(found["matrix"], expected)
    assert torch.equal(found["bias"], stored["bias"])


def every_code(parts: dict[str, Tensor]) -> None:
    """All 256 bytes as codes (NaN too) and, of scales of 8 bits, all in turn."""
    for name, part in parts.items():
        if part.itemsize == 1 and (name in (CODES, SCALES)):
            numbers = torch.arange(part.numel()) * (1 if name == CODES else 7) % 256
            part.view(torch.uint8).copy_(numbers.view(part.shape))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", ENCODINGS)
def test_blocks_decode_to_the_very_bits_of_torch(name: str, dtype: torch.dtype) -> None:
    shape = 16, 96 if "24" in name else 128
    assert_decodes(block_in(ENCODINGS[name](*shape), shape, dtype), every_code)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_code_decodes_with_every_scale_of_8_bits(name: str) -> None:
    shape = 256, 512 if name == "mxfp8" else 32

    def fill(parts: dict[str, Tensor]) -> None:
        parts[CODES].view(torch.uint8).copy_(torch.arange(parts[CODES].shape[1]) % 256)
        parts[CODES].view(torch.uint8)[1::2] += 128 if name == "mxfp8" else 16
        parts[SCALES].view(torch.uint8).copy_(torch.arange(256)[:, None])

    assert_decodes(block_in(ENCODINGS[name](*shape), shape, BF16), fill)


def test_negative_scales_and_zeros_keep_their_signs() -> None:
    shape = 8, 64

    def negate(parts: dict[str, Tensor]) -> None:
        parts[SCALES].neg_()

    for name in ("int4", "int4 with zeros", "fp8 by rows"):
        assert_decodes(block_in(ENCODINGS[name](*shape), shape, BF16), negate)


def test_rows_that_kernels_cannot_take_by_eights_are_refused() -> None:
    assert reason_against(CodedMatrix(MXFP4(), (4, 64), False)) is None
    uneven = CodedMatrix(Int4Group(columns=12), (4, 24), False)
    assert "groups of 12 have no kernel" in str(reason_against(uneven))
    assert "rows of 20" in str(reason_against(CodedMatrix(FP8Block(columns=20), (4, 20), False)))
