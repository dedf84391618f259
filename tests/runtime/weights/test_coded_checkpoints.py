"""Quantised checkpoints: their experts stay in codes, and the weights are those of their twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import runtime
from runtime.weights.encodings.coded import bits_a_weight
from tests.helpers.offloading import check, generate
from tests.helpers.quantised import LAYOUTS, write_quantised
from tests.helpers.tiny import tiny_model, tiny_tokenizer

SIZES = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 3}
QWEN = {"moe_intermediate_size": 32, "mlp_only_layers": [1]}
STACKED = {"mxfp4 gpt-oss": "gpt_oss", "fp8 stacked": "qwen3_moe"}
"""Architectures of layouts whose experts are stacked in one tensor."""
CONFIGS = {
    "mxfp4": "Mxfp4Config",
    "fp8": "FineGrainedFP8Config",
    "mxfp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""transformers' configurations that dequantise, by method."""
BEYOND_TRANSFORMERS = {
    "fp8 16x24": "blocks that are cut at the end of a row",
    "fp8 stacked": "scales of stacked experts, which it ignores",
    "mxfp8 compressed-tensors": "scales of groups, for experts in 8 bits",
}
"""Layouts that the library refuses or misreads."""

Written = Callable[[str], tuple[Path, Path]]


def small_model(kind: str) -> Any:
    sizes = {"intermediate_size": 32} if kind == "gpt_oss" else QWEN
    return tiny_model(kind, **SIZES, **sizes).to(torch.bfloat16)


def save(layout: str, directory: Path) -> Path:
    """The unquantised model that a layout is made of."""
    model = small_model(STACKED.get(layout, "qwen3_moe"))
    if layout == "fp8 stacked":
        model._weight_conversions = []  # saved as the model has it, not one tensor for each expert
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A checkpoint in some layout, and the unquantised one with the same weights."""
    known: dict[str, tuple[Path, Path]] = {}

    def write(layout: str) -> tuple[Path, Path]:
        if layout not in known:
            root = tmp_path_factory.mktemp("layout")
            twin = root / "twin"
            coded = write_quantised(save(layout, root / "plain"), root / "coded", layout, twin=twin)
            known[layout] = (coded, twin)
        return known[layout]

    return write


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of an offloaded model, which is not offloaded any more."""
    return model.expertflow.detach().state_dict()  # type: ignore[union-attr,operator]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same(found[name], tensor)] == []


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_coded_model_is_its_unquantised_twin(layout: str, written: Written) -> None:
    coded, twin = written(layout)
    expected: Any = runtime.load(twin, memory=1.0)
    for host in ("file", "memory"):
        for memory in (0.25, 1.0):
            model: Any = runtime.load(coded, memory=memory, host=host)
            assert torch.equal(generate(model), generate(expected))
            check(model)
    assert f" {LAYOUTS[layout].encoding} experts fit" in model.expertflow.report()
    assert_equal(weights(model), weights(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_of_transformers_own_dequantisation(
    layout: str, written: Written
) -> None:
    name = CONFIGS.get(LAYOUTS[layout].quantization["quant_method"])
    if name is None or layout in BEYOND_TRANSFORMERS:
        pytest.skip("transformers cannot dequantise it")
    if name == "CompressedTensorsConfig":
        pytest.importorskip("compressed_tensors")
    coded, _ = written(layout)
    dequantise = getattr(transformers, name)(dequantize=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        coded, quantization_config=dequantise
    )
    model: Any = runtime.load(coded, memory=0.25)
    assert_equal(weights(model), reference.state_dict())
