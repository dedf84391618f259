"""File of the differences: what smol-moe adds to the dense model, in int8.

Every difference is a sum of products of a column and a row, and each of these vectors is stored as
int8 with one scale. `differences.safetensors` has, for L layers of E experts of rank R:

    router                        bfloat16 [L, E, H]
    gate_in, up_in, down_in       int8 [L, E x R, width in], and ..._scale float32 [L, E x R]
    gate_out, up_out, down_out    int8 [L, width out, E x R], and ..._scale float32 [L, E x R]

Its metadata names the shape, the dense model and that model's SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from exports.smol.layer import MATRICES, UpcycledBlock
from exports.smol.settings import Experts

FORMAT = "expertflow-smol-1"
FILE = "differences.safetensors"
LARGEST = 127


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Routers and narrow matrices of all layers, float32."""

    experts: Experts
    router_LEH: Tensor
    pairs: dict[str, Tensor]
    """`gate_in` [L, E x R, width in], `gate_out` [L, width out, E x R], and so on."""
    dense_sha256: str


def differences_of(blocks: Sequence[UpcycledBlock], dense_sha256: str) -> Differences:
    """The differences that upcycled blocks have learned."""
    names = [f"{name}_{side}" for name in MATRICES for side in ("in", "out")]
    return Differences(
        experts=blocks[0].experts,
        router_LEH=torch.stack([block.router.detach().float().cpu() for block in blocks]),
        pairs={
            name: torch.stack([block.pairs[name].detach().float().cpu() for block in blocks])
            for name in names
        },
        dense_sha256=dense_sha256,
    )


@torch.no_grad()
def put_into(differences: Differences, blocks: Sequence[UpcycledBlock]) -> None:
    """Set upcycled blocks to the differences."""
    for index, block in enumerate(blocks):
        block.router.copy_(differences.router_LEH[index])
        for name, stacked in differences.pairs.items():
            block.pairs[name].copy_(stacked[index])


def pack(differences: Differences, path: Path) -> None:
    """Write the file."""
    shape = differences.experts
    experts = {name: getattr(shape, name) for name in ("num_experts", "top_k", "rank")}
    tensors = {"router": differences.router_LEH.bfloat16()}
    for name, stacked in differences.pairs.items():
        codes, scale_LN = _to_codes(stacked, name)
        tensors |= {name: codes, f"{name}_scale": scale_LN}
    metadata = {
        "format": FORMAT,
        "experts": json.dumps(experts),
        "dense_sha256": differences.dense_sha256,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def unpack(path: Path) -> Differences:
    """Read the file. Raises ValueError for one that is missing, damaged or of another format."""
    if not path.is_file():
        raise ValueError(f"{path} not found: python -m exports.smol.train writes it")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of differences in the format {FORMAT}")
    names = [f"{name}_{side}" for name in MATRICES for side in ("in", "out")]
    return Differences(
        experts=Experts(**json.loads(metadata["experts"])),
        router_LEH=tensors["router"].float(),
        pairs={
            name: tensors[name].float() * _along(tensors[f"{name}_scale"], name) for name in names
        },
        dense_sha256=metadata["dense_sha256"],
    )


def _to_codes(stacked: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """int8 codes and a scale for each vector, float32 [L, E x R]."""
    width = 2 if name.endswith("_in") else 1
    scale_LN = stacked.abs().amax(width).clamp_min(1e-12) / LARGEST
    return (stacked / _along(scale_LN, name)).round().to(torch.int8), scale_LN


def _along(scale_LN: Tensor, name: str) -> Tensor:
    """Scales in the shape that multiplies the matrices `name`."""
    return scale_LN[:, :, None] if name.endswith("_in") else scale_LN[:, None, :]
