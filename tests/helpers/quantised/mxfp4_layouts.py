"""Layouts of checkpoints whose experts are in mxfp4."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.quantised.coding import to_e4m3, to_mxfp4
from tests.helpers.quantised.layout import (
    Coded,
    Layout,
    compressed_tensors,
    is_dense,
    is_expert,
    is_stacked,
)
from tests.helpers.quantised.reference import decode

BLOCK = (1, 32)
E8M0 = torch.float8_e8m0fnu


def _gpt_oss(key: str, tensor: Tensor) -> Coded | None:
    if not is_stacked(key, tensor) or tensor.shape[1] % 32:
        return None
    codes, scales = to_mxfp4(tensor.mT)
    tensors = {f"{key}_blocks": codes.unflatten(-1, (-1, 16)), f"{key}_scales": scales}
    return Coded(tensors, decode(codes, scales, BLOCK, torch.float32).mT)


def _packed(key: str, tensor: Tensor) -> Coded | None:
    if not is_expert(key, tensor) or tensor.shape[1] % 32:
        return None
    codes, scales = to_mxfp4(tensor)
    name = key.removesuffix(".weight")
    tensors = {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales}
    return Coded(tensors, decode(codes, scales, BLOCK, torch.float32))


def _deepseek(key: str, tensor: Tensor) -> Coded | None:
    """Experts of 4 bits among dense weights of 8; both have powers of two as scales."""
    name = key.removesuffix(".weight")
    if is_expert(key, tensor) and tensor.shape[1] % 32 == 0:
        codes, scales = to_mxfp4(tensor)
        tensors = {key: codes.view(torch.int8), f"{name}.scale": scales.view(E8M0)}
        return Coded(tensors, decode(codes, scales, BLOCK, torch.float32))
    if is_dense(key, tensor):
        codes, scales = to_e4m3(tensor, (128, 128), E8M0)
        weights = decode(codes, scales, (128, 128), torch.float32)
        return Coded({key: codes, f"{name}.scale": scales}, weights)
    return None


LAYOUTS = {
    "mxfp4 gpt-oss": Layout(
        "mxfp4",
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        _gpt_oss,
        "gpt_oss",
    ),
    "mxfp4 compressed-tensors": Layout(
        "mxfp4",
        compressed_tensors(
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        ),
        _packed,
    ),
    "mxfp4 deepseek": Layout(
        "mxfp4",
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
            "expert_dtype": "fp4",
        },
        _deepseek,
    ),
}
