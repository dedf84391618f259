"""The matrices of a checkpoint, by all finders together; refusals name the method or the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.table import ENCODINGS, FINDERS, find_all, normalised
from runtime.weights.files import CheckpointFiles, Entry

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WEIGHT, SCALES = "a.experts.0.up_proj.weight", "a.experts.0.up_proj.weight_scale_inv"
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Dtypes and shapes, by key."""
MATRIX: Tensors = {WEIGHT: ("F8_E4M3", (256, 128)), SCALES: ("F32", (2, 1))}


def entries(tensors: Tensors) -> dict[str, Entry]:
    return {key: Entry("f", dtype, shape, 0, 0) for key, (dtype, shape) in tensors.items()}


def files(directory: Path, **tensors: Tensor) -> CheckpointFiles:
    save_file(tensors, directory / "model.safetensors")
    return CheckpointFiles(directory)


@pytest.mark.parametrize(
    "method",
    ["bitsandbytes", "hqq", "quanto", "torchao", "aqlm", "eetq", "higgs", "bitnet", "vptq", "spqr",
     "quark", "fbgemm_fp8", "fp_quant", "gguf", "nonsense"],
)  # fmt: skip
def test_other_quantisation_is_refused_by_name(method: str) -> None:
    with pytest.raises(ValueError, match=f"quantisation {method} is not supported.*fp8.*mxfp4"):
        find_all(entries(MATRIX), {"quant_method": method})


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_that_old_files_name_by_its_bits_is_refused_by_name(bits: int) -> None:
    with pytest.raises(ValueError, match="bitsandbytes is not supported"):
        find_all({}, {f"load_in_{bits}bit": True, "bnb_4bit_quant_type": "nf4"})


@pytest.mark.parametrize("quantization", [{}, {"quant_method": None}, {"bits": 4}], ids=str)
def test_quantisation_without_a_method_is_refused(quantization: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="names no quant_method"):
        find_all({}, quantization)


def test_every_finder_has_an_encoding_of_the_table() -> None:
    for module in FINDERS:
        found = [kind for kind in ENCODINGS.values() if kind.__module__ == module.__name__]
        assert len(found) == 1, module.__name__
        assert module.METHODS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_block_size", 128),
        ("weight_block_size", [128]),
        ("weight_block_size", [0, 128]),
        ("weight_block_size", ["128", "128"]),
        ("config_groups", [1]),
        ("config_groups", {"group_0": "fp8"}),
        ("config_groups", {"group_0": {"weights": 8}}),
    ],
    ids=str,
)
def test_damaged_description_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        find_all(entries(MATRIX), FP8 | {name: value})


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "modelopt_fp8"},
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
    ],
    ids=str,
)
def test_files_of_modelopt_are_known_in_all_their_forms(quantization: dict[str, Any]) -> None:
    assert normalised(quantization)["quant_method"] == "modelopt"
    found = find_all(entries({"up.weight": ("F8_E4M3", (8, 8)), "up.weight_scale": ("F32", ())}),
                     quantization)  # fmt: skip
    assert found["up.weight"].encoding == FP8Block(rows=8, columns=8)


def test_blocks_of_modelopt_have_dimensions_of_one_between() -> None:
    stored: Tensors = {
        "up.weight": ("F8_E4M3", (256, 384)),
        "up.weight_scale": ("F32", (2, 1, 3, 1)),
    }
    matrix = find_all(entries(stored), {"quant_method": "modelopt"})["up.weight"]
    assert matrix.encoding == FP8Block(rows=128, columns=128)
    scales = torch.rand(2, 1, 3, 1)
    assert torch.equal(matrix.convert({"scales": scales})["scales"], scales.view(2, 3))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (256,), (256, 1), (2, 1), (1, 128)], ids=str)
def test_block_is_found_by_the_shape_of_the_scales(shape: tuple[int, ...]) -> None:
    stored = MATRIX | {SCALES: ("BF16", shape)}
    encoding = find_all(entries(stored), FP8 | {"weight_block_size": None})[WEIGHT].encoding
    rows = shape[0] if shape else 1
    columns = shape[1] if len(shape) == 2 else 1
    expected = FP8Block(rows=256 // rows, columns=128 // columns, scale=torch.bfloat16)
    assert encoding == expected


def test_cut_block_is_the_one_that_the_configuration_names() -> None:
    stored: Tensors = {WEIGHT: ("F8_E4M3", (192, 128)), SCALES: ("F32", (2, 1))}
    matrix = find_all(entries(stored), FP8)[WEIGHT]
    scales = matrix.convert({"scales": torch.tensor([[1.0], [2.0]])})["scales"]
    codes = torch.ones(192, 128).to(E4M3)
    weights = matrix.encoding.decode({"codes": codes, "scales": scales}, torch.float32)
    assert weights[:, 0].tolist() == [1.0] * 128 + [2.0] * 64


def test_scales_are_repeated_where_blocks_do_not_divide_the_rows() -> None:
    stored: Tensors = {WEIGHT: ("F8_E4M3", (576, 200)), SCALES: ("F32", (5, 2))}
    matrix = find_all(entries(stored), FP8)[WEIGHT]
    assert matrix.encoding == FP8Block(rows=64, columns=128)
    scales = torch.arange(10.0).view(5, 2)
    converted = matrix.convert({"scales": scales})["scales"]
    assert converted[:, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8]


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"strategy": "channel"}, (2, 1)),
        ({"strategy": "group", "group_size": 32}, (256, 1)),
        ({"strategy": "block", "block_structure": [128, 128]}, (1, 1)),
    ],
    ids=str,
)
def test_fewer_scales_than_the_configuration_says_are_refused_by_name(
    settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    scheme = {"num_bits": 8, "type": "float"} | settings
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }
    name = WEIGHT.replace("weight", "weight_scale")
    stored: Tensors = {WEIGHT: MATRIX[WEIGHT], name: ("BF16", shape)}
    with pytest.raises(ValueError, match=name):
        find_all(entries(stored), quantization)


def test_scales_of_activations_count_for_nothing() -> None:
    others = ("input_scale", "k_scale", "v_scale", "activation_scale", "output_scale")
    more: Tensors = {f"a.experts.0.up_proj.{name}": ("F32", (1,)) for name in others}
    assert list(find_all(entries(MATRIX | more), FP8)) == [WEIGHT]


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("b.weight", "I8"),
        ("b.qweight", "I32"),
        ("b.weight_packed", "I32"),
        ("b.gate_up_proj_blocks", "U8"),
        ("b.weight", "F8_E4M3FNUZ"),
    ],
)
def test_codes_in_no_known_layout_are_refused_by_name(key: str, dtype: str) -> None:
    stored = MATRIX | {key: (dtype, (4, 8))}
    with pytest.raises(ValueError, match=f"b.*{dtype}"):
        find_all(entries(stored), FP8)


def test_codes_with_more_exponents_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=f"{WEIGHT} is stored as F8_E5M2"):
        find_all(entries(MATRIX | {WEIGHT: ("F8_E5M2", (256, 128))}), FP8)


def test_weight_that_is_there_twice_is_refused_by_name() -> None:
    key = "a.experts.up_proj"
    stored: Tensors = {
        key: ("BF16", (2, 64, 8)),
        f"{key}_blocks": ("U8", (2, 8, 2, 16)),
        f"{key}_scales": ("U8", (2, 8, 2)),
    }
    with pytest.raises(ValueError, match=f"{key} is there as it is and in codes"):
        find_all(entries(stored), {"quant_method": "mxfp4"})


@pytest.mark.parametrize(
    "settings",
    [
        {"transform_config": {"config_groups": {"R1": {}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
    ],
    ids=str,
)
def test_more_than_codes_is_refused_by_name(settings: dict[str, Any]) -> None:
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}} | settings
    with pytest.raises(ValueError, match=next(iter(settings))):
        find_all({}, quantization)


def test_settings_of_sparsity_and_transformation_may_be_empty() -> None:
    quantization = {
        "quant_method": "compressed-tensors",
        "transform_config": {},
        "sparsity_config": {"format": "dense"},
    }
    assert find_all({}, quantization) == {}


def test_scale_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    scales = torch.tensor([[127], [255]], dtype=torch.uint8).view(E8M0)
    stored = files(tmp_path, **{WEIGHT: torch.zeros(256, 128).to(E4M3), SCALES: scales})
    matrix = find_all(stored.entries, FP8)[WEIGHT]
    parts = {part: stored.get(key) for part, key in matrix.sources.items()}
    with pytest.raises(ValueError, match=f"a scale of {SCALES} is not a number"):
        matrix.convert(parts)


def test_numbers_of_four_bits_may_be_named_so(tmp_path: Path) -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(4, 16)
    scales = torch.tensor([[127], [128], [129], [130]], dtype=torch.uint8).view(E8M0)
    stored = files(tmp_path, **{WEIGHT: codes.view(torch.float4_e2m1fn_x2), SCALES: scales})
    matrix = find_all(stored.entries, FP8)[WEIGHT]
    assert matrix.encoding == MXFP4()
    assert matrix.shape == (4, 32)
    parts = matrix.convert({part: stored.get(key) for part, key in matrix.sources.items()})
    assert torch.equal(parts["codes"], codes)
