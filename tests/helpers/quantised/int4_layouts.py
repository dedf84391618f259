"""Layouts of checkpoints whose experts are in whole numbers of 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.quantised import integers
from tests.helpers.quantised.coding import to_e4m3
from tests.helpers.quantised.layout import (
    Code,
    Coded,
    Layout,
    compressed_tensors,
    is_dense,
    is_expert,
)
from tests.helpers.quantised.reference import decode, decode_integers

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WHOLE = 1 << 40
"""Columns of a group that is as wide as any matrix."""


def _packed(columns: int, dtype: torch.dtype, *, symmetric: bool = True) -> Code:
    """Experts as compressed-tensors packs them."""

    def code(key: str, tensor: Tensor) -> Coded | None:
        if not is_expert(key, tensor) or (columns < WHOLE and tensor.shape[1] % columns):
            return None
        found = integers.round_to_int4(tensor, columns, dtype, symmetric=symmetric)
        name = key.removesuffix(".weight")
        tensors = {
            f"{name}.weight_packed": integers.pack_rows(found.codes),
            f"{name}.weight_scale": found.scales,
            f"{name}.weight_shape": torch.tensor(tensor.shape),
        }
        if not symmetric:
            tensors[f"{name}.weight_zero_point"] = integers.pack_rows(found.zeros.mT).mT
        return Coded(tensors, decode_integers(*found))

    return code


def _kimi(key: str, tensor: Tensor) -> Coded | None:
    """Experts of 4 bits, attention of 8."""
    if not is_dense(key, tensor):
        return _packed(32, BF16)(key, tensor)
    codes, scales = to_e4m3(tensor, (1, tensor.shape[1]), FP32)
    weights = decode(codes, scales, (1, tensor.shape[1]), FP32)
    return Coded({key: codes, f"{key}_scale": scales}, weights)


def _gptq(columns: int, *, symmetric: bool, subtracted: int) -> Code:
    """subtracted: from the zeros."""

    def code(key: str, tensor: Tensor) -> Coded | None:
        if not is_expert(key, tensor) and not is_dense(key, tensor):
            return None
        if columns < WHOLE and tensor.shape[1] % columns:
            return None
        found = integers.round_to_int4(tensor, columns, FP16, symmetric=symmetric, least=subtracted)
        name = key.removesuffix(".weight")
        width = tensor.shape[1]
        tensors = {
            f"{name}.qweight": integers.pack_rows(found.codes).mT,
            f"{name}.qzeros": integers.pack_rows((found.zeros - subtracted).mT),
            f"{name}.scales": found.scales.mT,
            f"{name}.g_idx": torch.arange(width, dtype=torch.int32) // min(columns, width),
        }
        return Coded(tensors, decode_integers(*found))

    return code


def _awq(key: str, tensor: Tensor) -> Coded | None:
    if not is_expert(key, tensor) and not is_dense(key, tensor):
        return None
    found = integers.round_to_int4(tensor, 32, FP16, symmetric=False)
    name = key.removesuffix(".weight")
    tensors = {
        f"{name}.qweight": integers.pack_awq(found.codes.mT),
        f"{name}.qzeros": integers.pack_awq(found.zeros.mT),
        f"{name}.scales": found.scales.mT,
    }
    return Coded(tensors, decode_integers(*found))


def _pack_quantized(columns: int | None, *, symmetric: bool = True) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group" if columns else "channel", "group_size": columns}
    return compressed_tensors("pack-quantized", weights)


def _mixed() -> dict[str, Any]:
    """The quantisation of experts in int4 and attention in fp8."""
    experts, dense = (
        _pack_quantized(32),
        compressed_tensors(
            "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}
        ),
    )
    groups = {"group_0": dense["config_groups"]["group_0"]}
    groups["group_0"]["targets"] = ["re:.*self_attn.*"]
    groups["group_1"] = experts["config_groups"]["group_0"]
    groups["group_1"]["targets"] = ["re:.*mlp.experts.*"]
    return experts | {"config_groups": groups, "format": "mixed-precision"}


GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": True}

LAYOUTS = {
    "int4 compressed-tensors 32": Layout("int4-group", _pack_quantized(32), _packed(32, BF16)),
    "int4 compressed-tensors 64": Layout("int4-group", _pack_quantized(64), _packed(64, BF16)),
    "int4 compressed-tensors asymmetric": Layout(
        "int4-group",
        _pack_quantized(128, symmetric=False),
        _packed(128, FP16, symmetric=False),
    ),
    "int4 compressed-tensors channel": Layout(
        "int4-group", _pack_quantized(None), _packed(WHOLE, BF16)
    ),
    "int4 kimi": Layout("int4-group", _mixed(), _kimi),
    "int4 gptq": Layout(
        "int4-group", GPTQ | {"group_size": 128}, _gptq(128, symmetric=True, subtracted=1)
    ),
    "int4 gptq asymmetric": Layout(
        "int4-group",
        GPTQ | {"group_size": 32, "sym": False},
        _gptq(32, symmetric=False, subtracted=1),
    ),
    "int4 gptq_v2": Layout(
        "int4-group",
        GPTQ | {"group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
        _gptq(WHOLE, symmetric=False, subtracted=0),
    ),
    "int4 awq": Layout(
        "int4-group",
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        _awq,
    ),
}
