"""nvfp4: as compressed-tensors decompresses it, and in the layouts of ModelOpt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.weights.encodings.encoding import CODES, SCALES
from runtime.weights.encodings.nvfp4 import GLOBAL_SCALES, NVFP4
from runtime.weights.encodings.table import find_all
from runtime.weights.files import Entry

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
KEY = "model.layers.0.mlp.experts.0.up_proj"
STACKED = "model.layers.0.mlp.experts.gate_up_proj"
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
PACKED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def find(tensors: Shapes, quantization: dict[str, Any] = MODELOPT) -> Any:
    entries = {key: Entry("f", dtype, shape, 0, 0) for key, (dtype, shape) in tensors.items()}
    return find_all(entries, quantization)


def every_code_and_scale() -> dict[str, Tensor]:
    """All codes, with all scales but what is not a number."""
    codes = torch.arange(256, dtype=torch.uint8).view(32, 8)
    scales = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    return {
        CODES: codes.flatten().repeat(len(scales), 1),
        SCALES: scales.view(E4M3)[:, None].repeat(1, 32),
    }


@pytest.mark.parametrize("size", [1.0, 3e-5, 0.7, 448.0, 2688.0, 1e5, 1e-12])
def test_every_code_and_scale_is_that_of_compressed_tensors(size: float) -> None:
    """It knows no other number format than bfloat16."""
    library = pytest.importorskip("compressed_tensors")
    parts = every_code_and_scale()
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    expected = library.compressors.NVFP4PackedCompressor.decompress(
        {
            "weight_packed": parts[CODES],
            "weight_scale": parts[SCALES],
            "weight_global_scale": torch.tensor([size]),
        },
        scheme,
    )["weight"]
    encoding = NVFP4(rows=len(parts[CODES]), divides=True)
    found = encoding.decode(parts | {GLOBAL_SCALES: torch.tensor([size])}, BF16)
    assert expected.dtype == BF16
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_global_scales_are_multiplied_by_in_float32(dtype: torch.dtype) -> None:
    parts = every_code_and_scale()
    one = torch.tensor([0.00123])
    found = NVFP4(rows=len(parts[CODES])).decode(parts | {GLOBAL_SCALES: one}, dtype)
    scales = (parts[SCALES].float() * one).repeat_interleave(16, 1)
    plain = NVFP4(rows=len(parts[CODES])).decode(
        {
            CODES: parts[CODES],
            SCALES: torch.ones_like(parts[SCALES].float()).to(E4M3),
            GLOBAL_SCALES: torch.ones(1),
        },
        FP32,
    )
    assert torch.equal(found, (plain * scales).to(dtype))


def test_gate_and_up_keep_their_own_global_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (8, 16), generator=generator, dtype=torch.uint8)
    parts = {CODES: codes, SCALES: torch.rand((8, 2), generator=generator).to(E4M3)}
    found = NVFP4(rows=4).decode(parts | {GLOBAL_SCALES: torch.tensor([0.5, 3.0])}, FP32)
    for half, size in ((slice(4), 0.5), (slice(4, 8), 3.0)):
        own = {name: part[half] for name, part in parts.items()}
        expected = NVFP4(rows=4).decode(own | {GLOBAL_SCALES: torch.tensor([size])}, FP32)
        assert torch.equal(found[half], expected)


def a_matrix(**changes: tuple[str, tuple[int, ...]]) -> Shapes:
    tensors = {
        "weight": ("U8", (8, 32)),
        "weight_scale": ("F8_E4M3", (8, 4)),
        "weight_scale_2": ("F32", ()),
        "input_scale": ("F32", ()),
    }
    return {f"{KEY}.{name}": entry for name, entry in (tensors | changes).items()}


def stacked(codes: tuple[int, ...], scales: tuple[int, ...], one: tuple[int, ...]) -> Shapes:
    return {
        STACKED: ("U8", codes),
        f"{STACKED}_weight_scale": ("F8_E4M3", scales),
        f"{STACKED}_weight_scale_2": ("F32", one),
    }


@pytest.mark.parametrize(
    ("one", "rows", "shared"),
    [
        ((), 8, True),
        ((1,), 8, True),
        ((3,), 8, False),
        ((3, 1), 8, False),
        ((3, 1, 1), 8, False),
        ((3, 2), 4, False),
        ((3, 2, 1), 4, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_are_found_in_either_orientation(
    one: tuple[int, ...], rows: int, shared: bool, transposed: bool
) -> None:
    codes, scales = ((3, 32, 8), (3, 4, 8)) if transposed else ((3, 8, 32), (3, 8, 4))
    matrix = find(stacked(codes, scales, one))[STACKED]
    assert matrix.shape == (3, 8, 64)
    assert matrix.weight_shape == ((3, 64, 8) if transposed else (3, 8, 64))
    assert matrix.encoding == NVFP4(rows=rows)
    assert matrix.shared == ({GLOBAL_SCALES} if shared else set())


@pytest.mark.parametrize("one", [(2,), (4,), (3, 3), (3, 4)], ids=str)
def test_other_numbers_of_global_scales_are_refused_by_name(one: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{STACKED}_weight_scale_2"):
        find(stacked((3, 8, 32), (3, 8, 4), one))


def test_more_global_scales_than_matrices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=f"{KEY}.weight_scale_2 has the shape"):
        find(a_matrix(weight_scale_2=("F32", (2,))))


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_2"])
def test_missing_scale_of_stacked_experts_is_refused_by_name(name: str) -> None:
    tensors = stacked((3, 8, 32), (3, 8, 4), (3,))
    del tensors[f"{STACKED}_{name}"]
    with pytest.raises(ValueError, match=f"{STACKED}.*{STACKED}_{name}, which is missing"):
        find(tensors)


def test_scales_of_activations_do_not_count() -> None:
    assert KEY + ".input_scale" not in find(a_matrix())[f"{KEY}.weight"].sources.values()


def test_activations_that_are_scaled_before_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=f"{KEY}.pre_quant_scale.*AWQ"):
        find(a_matrix(pre_quant_scale=("BF16", (64,))))


def test_codes_of_modelopt_in_whole_numbers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=f"{KEY}.weight_scale is stored as BF16"):
        find(a_matrix(weight_scale=("BF16", (8, 4))))


def test_packed_codes_without_a_global_scale_are_no_mxfp4() -> None:
    tensors: Shapes = {
        f"{KEY}.weight_packed": ("U8", (8, 32)),
        f"{KEY}.weight_scale": ("F8_E4M3", (8, 4)),
    }
    with pytest.raises(ValueError, match="weight_global_scale, which is missing"):
        find(tensors, PACKED)


def test_experts_in_nvfp4_and_attention_in_fp8_are_found_together() -> None:
    attention = "model.layers.0.self_attn.q_proj"
    tensors = a_matrix() | {
        f"{attention}.weight": ("F8_E4M3", (8, 64)),
        f"{attention}.weight_scale": ("F32", ()),
    }
    found = find(tensors, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"})
    assert {key: matrix.encoding.name for key, matrix in found.items()} == {
        f"{KEY}.weight": "nvfp4",
        f"{attention}.weight": "fp8-block",
    }
