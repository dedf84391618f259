"""One layout of quantised checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Coded(NamedTuple):
    """One weight as a quantised checkpoint has it."""

    tensors: dict[str, Tensor]
    """By their keys in the checkpoint."""
    weights: Tensor
    """That they stand for by the definition of the format, before they are rounded to the number
    format of the model."""


Code = Callable[[str, Tensor], Coded | None]
"""A tensor of the unquantised checkpoint, in codes; None where it stays as it is."""


class Layout(NamedTuple):
    """The tensors and the configuration of a kind of quantised checkpoint."""

    encoding: str
    """Of the experts, by its name in the runtime."""
    quantization: dict[str, Any]
    """The `quantization_config` of config.json."""
    code: Code
    architecture: str = "qwen3_moe"
    """Of a model that has such tensors, by its type."""


EXPERT = re.compile(r"\.experts\.(expert_)?\d+\..*weight$")
DENSE = re.compile(r"_proj(_with_mqa)?\.weight$")
"""Names of projections outside of experts; a router is none."""
STACKED = re.compile(
    r"experts\.((gate_up|down)_proj|fc\d\.weight|w\d+_weight)$"
    r"|(mlp|block_sparse_moe)\.(in|out)put_linear\.weight$|moe\.(gate|up|down)_proj\.weight$"
)


def is_expert(key: str, tensor: Tensor) -> bool:
    """True for the weight of a projection of one expert."""
    return tensor.ndim == 2 and EXPERT.search(key) is not None


def is_dense(key: str, tensor: Tensor) -> bool:
    """True for the weight of a projection that is not of an expert."""
    return tensor.ndim == 2 and ".experts." not in key and DENSE.search(key) is not None


def is_stacked(key: str, tensor: Tensor) -> bool:
    """True for the weights of all experts of a layer in one tensor."""
    return tensor.ndim == 3 and STACKED.search(key) is not None


def compressed_tensors(format: str, weights: dict[str, Any]) -> dict[str, Any]:
    """A `quantization_config` as llm-compressor writes it."""
    arguments = {"symmetric": True, "dynamic": False, "observer": "minmax"} | weights
    group = {"targets": ["Linear"], "weights": arguments, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*router.*"],
        "kv_cache_scheme": None,
    }
