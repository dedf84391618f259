"""Whole numbers of 4 bits, as compressed-tensors decompresses and as GPTQ and AWQ define them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.weights.encodings.encoding import CODES, SCALES
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.integers.packed import ZEROS, nibbles, packed
from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.encodings.table import find_all
from runtime.weights.files import Entry
from tests.helpers.quantised.int4_layouts import LAYOUTS
from tests.helpers.quantised.layout import compressed_tensors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "BF16", FP16: "F16", FP32: "F32", torch.int32: "I32", torch.int64: "I64"}
KEY = "model.layers.0.mlp.experts.0.up_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}

dtypes = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)


def find_one(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> StoredMatrix:
    entries = {
        key: Entry("f", NAMES[tensor.dtype], tuple(tensor.shape), 0, 0)
        for key, tensor in tensors.items()
    }
    (found,) = find_all(entries, quantization).values()
    return found


def convert(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> dict[str, Tensor]:
    matrix = find_one(tensors, quantization)
    return matrix.convert({part: tensors[key] for part, key in matrix.sources.items()})


def decode(tensors: dict[str, Tensor], quantization: dict[str, Any], dtype: torch.dtype) -> Tensor:
    matrix = find_one(tensors, quantization)
    return matrix.encoding.decode(convert(tensors, quantization), dtype)


def random_words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)


def random_scales(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(2).exp().to(dtype)


def number(words: Tensor, row: int, column: int, place: int) -> int:
    return int(words[row, column]) >> 4 * place & 15


# compressed-tensors


def pack_quantized(
    rows: int, columns: int, group: int | None, dtype: torch.dtype, *, symmetric: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one matrix of random bits, and the quantisation that they are in."""
    groups = columns // (group or columns)
    tensors = {
        f"{KEY}.weight_packed": random_words(rows, columns // 8),
        f"{KEY}.weight_scale": random_scales(rows, groups, dtype=dtype),
        f"{KEY}.weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors[f"{KEY}.weight_zero_point"] = random_words(-(-rows // 8), groups, seed=1)
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group" if group else "channel", "group_size": group}
    return tensors, compressed_tensors("pack-quantized", weights)


@dtypes
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_every_weight_is_that_of_compressed_tensors(
    dtype: torch.dtype, symmetric: bool, group: int | None
) -> None:
    library = pytest.importorskip("compressed_tensors")
    tensors, quantization = pack_quantized(20, 256, group, dtype, symmetric=symmetric)
    scheme = quantization["config_groups"]["group_0"]
    arguments = {k: v for k, v in scheme["weights"].items() if v is not None}
    compressor = library.compressors.PackedQuantizationCompressor
    expected = compressor.decompress(
        {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()},
        library.quantization.QuantizationScheme(targets=["Linear"], weights=arguments),
    )["weight"]
    for target in (BF16, FP16, FP32):
        found = decode(tensors, quantization, target)
        assert torch.equal(found, expected.to(target))
        assert torch.equal(torch.signbit(found), torch.signbit(expected.to(target)))


@pytest.mark.parametrize("target", [BF16, FP16, FP32], ids=str)
@dtypes
def test_every_code_is_decoded_with_every_zero(dtype: torch.dtype, target: torch.dtype) -> None:
    zeros = torch.arange(16, dtype=torch.uint8)[:, None]
    codes = packed(torch.arange(16, dtype=torch.uint8).repeat(16, 1))
    scales = random_scales(16, 1, dtype=dtype)
    encoding = Int4Group(columns=16, scale=dtype, zeros=True)
    found = encoding.decode({CODES: codes, SCALES: scales, ZEROS: zeros}, target)
    for zero in range(16):
        for code in range(16):
            expected = (torch.tensor(float(code - zero), dtype=dtype) * scales[zero, 0]).to(target)
            assert found[zero, code] == expected


def test_zeros_of_8_are_those_that_symmetric_codes_have() -> None:
    tensors, _ = pack_quantized(8, 64, 32, BF16, symmetric=True)
    parts = {CODES: tensors[f"{KEY}.weight_packed"].view(torch.uint8)}
    parts |= {SCALES: tensors[f"{KEY}.weight_scale"]}
    zeros = torch.full((8, 2), 8, dtype=torch.uint8)
    expected = Int4Group(columns=32).decode(parts, BF16)
    assert torch.equal(Int4Group(columns=32, zeros=True).decode(parts | {ZEROS: zeros}, BF16),
                       expected)  # fmt: skip


def test_codes_of_compressed_tensors_are_the_bytes_that_are_stored() -> None:
    tensors, quantization = pack_quantized(8, 64, 32, BF16, symmetric=True)
    parts = convert(tensors, quantization)
    words = tensors[f"{KEY}.weight_packed"]
    assert parts[CODES].data_ptr() == words.data_ptr(), "nothing is copied on the way to a slot"


def test_stored_shape_of_another_matrix_is_refused_by_name() -> None:
    tensors, quantization = pack_quantized(8, 64, None, BF16, symmetric=True)
    tensors[f"{KEY}.weight_shape"] = torch.tensor([8, 62])
    with pytest.raises(ValueError, match=r"weight_shape says \[8, 62\].*has \[8, 64\]"):
        convert(tensors, quantization)


def test_zeros_of_a_symmetric_quantisation_are_refused_by_name() -> None:
    tensors, _ = pack_quantized(8, 64, 32, BF16, symmetric=False)
    quantization = pack_quantized(8, 64, 32, BF16, symmetric=True)[1]
    with pytest.raises(ValueError, match=r"weight_zero_point is there.*symmetric"):
        find_one(tensors, quantization)


@pytest.mark.parametrize("bits", [2, 8])
def test_other_bits_are_refused_by_name(bits: int) -> None:
    tensors, quantization = pack_quantized(8, 64, 32, BF16, symmetric=True)
    quantization["config_groups"]["group_0"]["weights"]["num_bits"] = bits
    tensors[f"{KEY}.weight_packed"] = random_words(8, 64 * bits // 32)
    with pytest.raises(ValueError, match=rf"up_proj.weight_packed is in .* {bits} bits.* of 4 "):
        find_one(tensors, quantization)


@pytest.mark.parametrize("name", ["experts", "attention"])
def test_groups_that_both_fit_are_told_apart_by_their_targets(name: str) -> None:
    tensors, quantization = pack_quantized(8, 64, None, BF16, symmetric=True)
    (group,) = quantization["config_groups"].values()
    eight = group | {"weights": group["weights"] | {"num_bits": 8}, "targets": ["re:.*attention.*"]}
    group["targets"] = ["re:.*experts.*"]
    quantization["config_groups"]["group_1"] = eight
    tensors = {key.replace("experts", name): tensor for key, tensor in tensors.items()}
    if name == "experts":
        assert find_one(tensors, quantization).shape == (8, 64)
    else:
        with pytest.raises(ValueError, match=r"attention.* 8 bits"):
            find_one(tensors, quantization)


def test_columns_in_another_order_are_refused_by_name() -> None:
    tensors, quantization = pack_quantized(8, 64, 32, BF16, symmetric=True)
    order = f"{KEY}.weight_g_idx"
    tensors[order] = torch.arange(64, dtype=torch.int32) // 32
    convert(tensors, quantization)
    tensors[order] = tensors[order].flip(0)
    with pytest.raises(ValueError, match=f"{order}.*actorder.*not supported"):
        convert(tensors, quantization)


def test_experts_in_one_tensor_are_found() -> None:
    tensors, quantization = pack_quantized(8, 64, 32, BF16, symmetric=True)
    del tensors[f"{KEY}.weight_shape"]
    stacked = {key: torch.stack([tensor] * 3) for key, tensor in tensors.items()}
    assert find_one(stacked, quantization).shape == (3, 8, 64)


# GPTQ and AWQ


def gptq(rows: int, columns: int, group: int) -> dict[str, Tensor]:
    groups = columns // group
    return {
        f"{KEY}.qweight": random_words(columns // 8, rows),
        f"{KEY}.qzeros": random_words(groups, rows // 8, seed=1) & 0x66666666,  # below 15
        f"{KEY}.scales": random_scales(groups, rows, dtype=FP16),
        f"{KEY}.g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }


def awq(rows: int, columns: int, group: int) -> dict[str, Tensor]:
    groups = columns // group
    return {
        f"{KEY}.qweight": random_words(columns, rows // 8),
        f"{KEY}.qzeros": random_words(groups, rows // 8, seed=1),
        f"{KEY}.scales": random_scales(groups, rows, dtype=FP16),
    }


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([8, 16, 40]),
    groups=st.integers(1, 4),
    group=st.sampled_from([16, 32]),
    second=st.booleans(),
)
def test_weights_of_gptq_are_those_of_its_definition(
    rows: int, groups: int, group: int, second: bool
) -> None:
    columns = groups * group
    tensors = gptq(rows, columns, group)
    form = {"checkpoint_format": "gptq_v2"} if second else {}
    found = decode(tensors, GPTQ | {"sym": False, "group_size": group} | form, FP32)
    for n in range(rows):
        for k in range(columns):
            code = number(tensors[f"{KEY}.qweight"], k // 8, n, k % 8)
            zero = number(tensors[f"{KEY}.qzeros"], k // group, n // 8, n % 8) + (not second)
            scale = tensors[f"{KEY}.scales"][k // group, n]
            assert found[n, k] == torch.tensor(float(code - zero), dtype=FP16) * scale


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([8, 16, 40]),
    groups=st.integers(1, 4),
    group=st.sampled_from([16, 32]),
)
def test_weights_of_awq_are_those_of_its_definition(rows: int, groups: int, group: int) -> None:
    columns = groups * group
    tensors = awq(rows, columns, group)
    found = decode(tensors, AWQ | {"group_size": group}, FP32)
    for n in range(rows):
        place = AWQ_ORDER.index(n % 8)
        for k in range(columns):
            code = number(tensors[f"{KEY}.qweight"], k, n // 8, place)
            zero = number(tensors[f"{KEY}.qzeros"], k // group, n // 8, place)
            scale = tensors[f"{KEY}.scales"][k // group, n]
            assert found[n, k] == torch.tensor(float(code - zero), dtype=FP16) * scale


@given(
    numbers=st.lists(st.integers(0, 15), min_size=8, max_size=40).filter(lambda n: not len(n) % 8)
)
def test_packed_numbers_are_unpacked_again(numbers: list[int]) -> None:
    every = torch.tensor(numbers, dtype=torch.uint8)
    assert torch.equal(nibbles(packed(every)), every)


def test_symmetric_gptq_needs_no_zeros() -> None:
    tensors = gptq(16, 32, 16)
    tensors[f"{KEY}.qzeros"] = torch.full((2, 2), 0x77777777, dtype=torch.int32)
    matrix = find_one(tensors, GPTQ | {"sym": True})
    assert matrix.encoding == Int4Group(columns=16, scale=FP16)
    assert convert(tensors, GPTQ | {"sym": True}).keys() == {CODES, SCALES}
    expected = decode(tensors, GPTQ | {"sym": False}, BF16)
    assert torch.equal(decode(tensors, GPTQ | {"sym": True}, BF16), expected)


def test_symmetric_gptq_with_other_zeros_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=f"{KEY}.qzeros has other zeros"):
        convert(gptq(16, 32, 16), GPTQ | {"sym": True})


def test_zero_that_the_first_format_of_gptq_cannot_store_is_refused_by_name() -> None:
    tensors = gptq(16, 32, 16)
    tensors[f"{KEY}.qzeros"][0, 0] |= 0xF
    with pytest.raises(ValueError, match=rf"{KEY}.qzeros has the zero 0.*gptq_v2"):
        convert(tensors, GPTQ | {"sym": False})
    convert(tensors, GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"})


def test_gptq_in_another_order_of_columns_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"desc_act.*not supported"):
        find_one(gptq(16, 32, 16), GPTQ | {"desc_act": True})
    tensors = gptq(16, 32, 16)
    tensors[f"{KEY}.g_idx"] = tensors[f"{KEY}.g_idx"].flip(0)
    with pytest.raises(ValueError, match=f"{KEY}.g_idx.*desc_act.*not supported"):
        convert(tensors, GPTQ | {"sym": False})


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (GPTQ | {"bits": 8}, "gptq with 8 bits is not supported"),
        (GPTQ | {"checkpoint_format": "marlin"}, "format marlin is not supported"),
        (AWQ | {"bits": 8}, "awq with 8 bits is not supported"),
        (AWQ | {"version": "gemv"}, "format gemv is not supported"),
        (GPTQ | {"group_size": 24}, f"{KEY}.qweight has 32 columns: not in groups of 24"),
    ],
    ids=str,
)
def test_other_forms_are_refused_by_name(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_one(gptq(16, 32, 16), quantization)


def test_settings_of_old_files_of_awq_are_known() -> None:
    tensors = awq(16, 32, 16)
    old = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    found = decode(tensors, {"quant_method": "awq"} | old, BF16)
    assert torch.equal(found, decode(tensors, AWQ, BF16))


def test_layouts_cover_every_method_and_both_kinds_of_zeros() -> None:
    methods = {layout.quantization["quant_method"] for layout in LAYOUTS.values()}
    assert methods == {"compressed-tensors", "gptq", "awq"}
