"""Layouts of checkpoints whose projections are in fp8, with a scale for each block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.quantised.coding import to_e4m3
from tests.helpers.quantised.layout import (
    Code,
    Coded,
    Layout,
    compressed_tensors,
    is_dense,
    is_expert,
    is_stacked,
)
from tests.helpers.quantised.reference import decode

INV, SCALE = "weight_scale_inv", "weight_scale"
FP32, BF16, BYTES = torch.float32, torch.bfloat16, torch.uint8


def _blocks(
    rows: int | None, columns: int | None, dtype: torch.dtype, name: str, *, single: bool = False
) -> Code:
    """All projections in blocks; None for as many rows or columns as there are.

    single: the only scale of a matrix is no matrix itself.
    """

    def code(key: str, tensor: Tensor) -> Coded | None:
        if not is_expert(key, tensor) and not is_dense(key, tensor):
            return None
        block = (rows or tensor.shape[0], columns or tensor.shape[1])
        if columns == 32 and tensor.shape[1] % 32:
            return None
        codes, scales = to_e4m3(tensor, block, dtype)
        stored = scales.reshape(()) if single else scales
        tensors = {key: codes, key.removesuffix("weight") + name: stored}
        weights = decode(codes, scales, block, FP32)
        if name == SCALE and dtype == BF16 and is_dense(key, tensor):
            weights = weights.to(BF16)  # as compressed-tensors multiplies
        return Coded(tensors, weights)

    return code


def _stacked(key: str, tensor: Tensor) -> Coded | None:
    if not is_stacked(key, tensor):
        return None
    codes, scales = to_e4m3(tensor, (16, 16))
    weights = decode(codes, scales, (16, 16), FP32)
    return Coded({key: codes, f"{key}_scale_inv": scales}, weights)


def _fp8(**settings: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    } | settings


def _float_quantized(strategy: str, **settings: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy} | settings
    return compressed_tensors("float-quantized", weights)


MXFP8 = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}

LAYOUTS = {
    "fp8 stacked": Layout("fp8-block", _fp8(weight_block_size=[16, 16]), _stacked, "gpt_oss")
} | {
    name: Layout("fp8-block", quantization, code)
    for name, quantization, code in (
        ("fp8 128x128", _fp8(), _blocks(128, 128, FP32, INV)),
        ("fp8 128x128 bf16", _fp8(), _blocks(128, 128, BF16, INV)),
        ("fp8 16x16", _fp8(weight_block_size=[16, 16]), _blocks(16, 16, FP32, INV)),
        ("fp8 24x24", _fp8(weight_block_size=[24, 24]), _blocks(24, 24, FP32, INV)),
        (
            "fp8 e8m0",
            _fp8(scale_fmt="ue8m0"),
            _blocks(128, 128, torch.float8_e8m0fnu, "scale"),
        ),
        ("fp8 mistral", _fp8(weight_block_size=None), _blocks(None, None, BF16, "qscale_weight")),
        (
            "fp8 one scale",
            _fp8(weight_block_size=None),
            _blocks(None, None, FP32, INV, single=True),
        ),
        (
            "mxfp8",
            _fp8(quant_method="mxfp8", weight_block_size=[1, 32], scale_fmt="ue8m0"),
            _blocks(1, 32, BYTES, INV),
        ),
        (
            "fp8 compressed-tensors channel",
            _float_quantized("channel"),
            _blocks(1, None, BF16, SCALE),
        ),
        (
            "fp8 compressed-tensors tensor",
            _float_quantized("tensor"),
            _blocks(None, None, FP32, SCALE),
        ),
        (
            "fp8 compressed-tensors block",
            _float_quantized("block", block_structure=[128, 128]),
            _blocks(128, 128, BF16, SCALE),
        ),
        (
            "mxfp8 compressed-tensors",
            compressed_tensors("mxfp8-quantized", MXFP8),
            _blocks(1, 32, BYTES, SCALE),
        ),
        (
            "fp8 modelopt",
            {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}},
            _blocks(None, None, FP32, SCALE, single=True),
        ),
    )
}
