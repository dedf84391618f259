"""Decoded weights are, bit for bit, those of transformers' own dequantisation."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from runtime.weights.encodings.encoding import CODES, SCALES
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.mxfp4 import MXFP4
from tests.helpers.quantised import LAYOUTS, LayoutWriter
from tests.helpers.quantised.checkpoint import SINGLE, read_tensors
from tests.helpers.quantised.decoding import decode_all

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
UNSUPPORTED = {
    "fp8 24x24": "blocks that are cut at the end",
    "mxfp8 compressed-tensors": "experts with scales of a group",
    "fp8 compressed-tensors block": "experts with scales of blocks",
    "fp8 modelopt": "no quantiser for ModelOpt",
    "fp8 stacked": "no scales of stacked experts",
    "int4 compressed-tensors asymmetric": "no zeros of experts",
    "nvfp4 compressed-tensors": "global scales of experts are left out",
    "nvfp4 modelopt": "no quantiser for ModelOpt",
}
"""Layouts of which transformers can load no checkpoint, and why."""

CONFIGS = {
    "mxfp4": "Mxfp4Config",
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""transformers' configurations with `dequantize`, by quantisation method."""

LOADED = [
    name
    for name, layout in LAYOUTS.items()
    if name not in UNSUPPORTED and layout.quantization["quant_method"] in CONFIGS
]

NEEDED = {
    "mistral": (transformers.quantizers.quantizer_finegrained_fp8, "qscale_weight"),
    "compressed-tensors": (transformers.integrations.compressed_tensors, "get_dense_scheme"),
}
"""Words in modules of transformers that can load layouts; early versions lack some."""

dtypes = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)


def are_same(some: Tensor, others: Tensor) -> bool:
    """Equal bit for bit, but for the payload of what is not a number."""
    equal = (some == others) & (torch.signbit(some) == torch.signbit(others))
    return some.dtype == others.dtype and bool((equal | (some.isnan() & others.isnan())).all())


@dtypes
def test_every_pair_of_codes_is_decoded_with_every_scale_of_mxfp4(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    expected = convert_moe_packed_tensors(
        codes.view(1, 256, 16, 16), scales.view(1, 256, 16), dtype=dtype
    )
    parts = {CODES: codes, SCALES: scales}
    assert are_same(MXFP4().decode(parts, dtype), expected[0].mT)


SCALES_OF = {
    "float32": torch.cat(
        [torch.logspace(-44, 38, 250), torch.tensor([0.0, -0.0, -3.0, torch.nan])]
    ),
    "bfloat16": torch.arange(1 << 15, dtype=torch.int16).view(BF16)[::61],
    "uint8": torch.arange(256, dtype=torch.uint8),
}


@dtypes
@pytest.mark.parametrize("scales", SCALES_OF.values(), ids=SCALES_OF)
def test_every_code_is_decoded_with_scales_of_all_sizes_of_fp8(
    dtype: torch.dtype, scales: Tensor
) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1).view(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales[:, None], dtype)
    encoding = FP8Block(rows=1, columns=256, scale=scales.dtype)
    assert are_same(encoding.decode({CODES: codes, SCALES: scales[:, None]}, dtype), expected)


@dtypes
def test_packed_codes_of_deepseek_are_those_of_mxfp4(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)
    stored = codes.view(torch.int8), scales.view(torch.float8_e8m0fnu)
    expected = Fp8Dequantize(None)._dequantize_one(*stored, dtype)
    assert are_same(MXFP4().decode({CODES: codes, SCALES: scales}, dtype), expected)


def test_transformers_takes_another_block_where_the_last_one_is_cut() -> None:
    """When this fails, it takes the configured one, as `find` does: 128 rows, then 64."""
    codes, scales = torch.ones(192, 128).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]])
    weights = Fp8Dequantize(None)._dequantize_one(codes, scales, FP32)
    assert weights[:, 0].tolist() == [1.0] * 96 + [2.0] * 96


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> LayoutWriter:
    return LayoutWriter(tmp_path_factory.mktemp("layouts"))


@dtypes
@pytest.mark.parametrize("layout", LOADED)
def test_model_has_the_weights_that_transformers_loads(
    writer: LayoutWriter, tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    if LAYOUTS[layout].quantization["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    for name, (module, word) in NEEDED.items():
        if name in layout and word not in inspect.getsource(module):
            pytest.skip(f"this version of transformers cannot load {name}")
    plain, quantised = writer.source(layout), writer(layout)[0]
    expected, found = loaded_and_decoded(plain, quantised, tmp_path, dtype)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # transformers may leave some in the stored format
        assert are_same(found[name], tensor.to(found[name].dtype)), name


def loaded_and_decoded(
    plain: Path, quantised: Path, empty: Path, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that transformers decodes, and those of a model that it loads decoded."""
    expected = load(quantised, dtype, dequantise=True)
    decoded = read_tensors(plain / SINGLE) | decode_all(quantised, dtype)
    (empty / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file(decoded, empty / SINGLE, metadata={"format": "pt"})
    return expected, load(empty, dtype)


def load(directory: Path, dtype: torch.dtype, *, dequantise: bool = False) -> dict[str, Tensor]:
    """The weights of the model that transformers makes of `directory`."""
    options: dict[str, Any] = {}
    if dequantise:
        written = json.loads((directory / "config.json").read_text())["quantization_config"]
        chosen = getattr(transformers, CONFIGS[written["quant_method"]])
        options["quantization_config"] = chosen.from_dict(written | {"dequantize": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    return dict(model.state_dict())


@pytest.mark.parametrize("layout", UNSUPPORTED)
def test_layouts_left_out_are_those_that_transformers_cannot_load(
    writer: LayoutWriter, tmp_path: Path, layout: str
) -> None:
    """This test fails when one of them can be compared."""
    method = LAYOUTS[layout].quantization["quant_method"]
    if method not in CONFIGS:
        assert method not in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
        return
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    plain, quantised = writer.source(layout), writer(layout)[0]
    try:
        expected, found = loaded_and_decoded(plain, quantised, tmp_path, BF16)
    except (RuntimeError, ValueError):
        return
    assert not all(are_same(found[name], tensor) for name, tensor in expected.items())
