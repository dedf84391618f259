"""Layouts of checkpoints whose experts are in nvfp4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.quantised.coding import blocks_of, nearest_e2m1, pack, spread
from tests.helpers.quantised.layout import (
    Code,
    Coded,
    Layout,
    compressed_tensors,
    is_expert,
    is_stacked,
)
from tests.helpers.quantised.reference import decode_nvfp4

BLOCK = (1, 16)
LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0


def to_nvfp4(weights: Tensor, *, divides: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [.., N, K / 2], scales [.., N, K / 16] and one global scale []."""
    one = (weights.float().abs().max() / (LARGEST_E2M1 * LARGEST_E4M3)).clamp(min=1e-12)
    scales = blocks_of(weights, BLOCK) / (LARGEST_E2M1 * one)
    scales = scales.clamp(2.0**-9, LARGEST_E4M3).to(torch.float8_e4m3fn)
    numbers = weights.float() / spread(scales.float() * one, BLOCK, weights.shape)
    return pack(nearest_e2m1(numbers)), scales, 1 / one if divides else one


def _each(key: str, tensor: Tensor) -> Coded | None:
    """Matrices of each expert, as ModelOpt writes them."""
    if not is_expert(key, tensor) or tensor.shape[1] % 16:
        return None
    codes, scales, one = to_nvfp4(tensor)
    name = key.removesuffix(".weight")
    tensors = {
        key: codes,
        f"{name}.weight_scale": scales,
        f"{name}.weight_scale_2": one,
        f"{name}.input_scale": torch.tensor(0.01),
    }
    return Coded(tensors, decode_nvfp4(codes, scales, one))


def _packed(key: str, tensor: Tensor) -> Coded | None:
    if not is_expert(key, tensor) or tensor.shape[1] % 16:
        return None
    codes, scales, one = to_nvfp4(tensor, divides=True)
    name = key.removesuffix(".weight")
    tensors = {
        f"{name}.weight_packed": codes,
        f"{name}.weight_scale": scales,
        f"{name}.weight_global_scale": one[None],
        f"{name}.input_global_scale": torch.tensor([100.0]),
    }
    return Coded(tensors, decode_nvfp4(codes, scales, one, divides=True))


def _stacked(*, transposed: bool, each: bool) -> Code:
    """All experts in one tensor.

    transposed: the model's parameters are [E, K, N], and codes lie across.
    each: every expert has a global scale of its own.
    """

    def code(key: str, tensor: Tensor) -> Coded | None:
        if not is_stacked(key, tensor) or not key.endswith((".weight", "_proj")):
            return None
        weights = tensor.mT if transposed else tensor
        if weights.shape[-1] % 16:
            return None
        of_experts = [to_nvfp4(expert) for expert in (weights if each else [weights])]
        codes, scales, ones = (torch.stack(part) for part in zip(*of_experts, strict=True))
        if not each:
            codes, scales, ones = codes[0], scales[0], ones[0]
        decoded = decode_nvfp4(codes, scales, ones[:, None, None] if each else ones)
        name = key.removesuffix(".weight") + ("." if key.endswith(".weight") else "_")
        tensors = {
            key: codes.mT if transposed else codes,
            f"{name}weight_scale": scales.mT if transposed else scales,
            f"{name}weight_scale_2": ones,
            f"{name}input_scale": torch.ones_like(ones),
        }
        return Coded(tensors, decoded.mT if transposed else decoded)

    return code


def _modelopt(**settings: Any) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "exclude_modules": ["lm_head", "*self_attn*", "*mlp.gate"],
        "kv_cache_quant_algo": "FP8",
    } | settings


LAYOUTS = {
    "nvfp4 modelopt": Layout("nvfp4", _modelopt(), _each),
    "nvfp4 compressed-tensors": Layout(
        "nvfp4",
        compressed_tensors(
            "nvfp4-pack-quantized",
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn",
                "zp_dtype": "torch.float8_e4m3fn",
            },
        ),
        _packed,
    ),
    "nvfp4 stacked": Layout("nvfp4", _modelopt(), _stacked(transposed=False, each=True), "gpt_oss"),
    "nvfp4 gpt-oss": Layout("nvfp4", _modelopt(), _stacked(transposed=True, each=False), "gpt_oss"),
}
