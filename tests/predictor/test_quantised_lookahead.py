"""A quantised model whose router inputs are read: its weights are decoded, or it is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from routing.pretrained import dequantising


def options(quantization: Any) -> dict[str, Any]:
    config = SimpleNamespace(quantization_config=quantization)
    config.get_text_config = lambda: config
    return dequantising(config)


def test_weights_that_the_library_can_decode_are_decoded() -> None:
    assert options(None) == {}
    found = options({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert found["quantization_config"].dequantize is True
    assert found["quantization_config"].modules_to_not_convert == ["lm_head"]


@pytest.mark.parametrize(
    "described",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "unknown"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ],
)
def test_a_quantisation_that_cannot_be_undone_is_refused_by_name(described: Any) -> None:
    with pytest.raises(
        ValueError, match=f"the quantisation {described['quant_method']} cannot|turn"
    ):
        options(described)
