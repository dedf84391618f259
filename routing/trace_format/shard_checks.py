"""Checks of a shard: its file against the manifest, its tensors against topology and counts.

T tokens, L MoE layers, K experts a token, D documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from routing.lookahead import PREFIX
from routing.topology import Stack
from routing.trace_format.extras import ROUTER, Extras

LARGEST_PHASE = 1
"""GENERATED: see `routing.shards`."""
FLOAT16_INFINITY = 0x7C00
"""The bits of float16 infinity. Those of NaN, without their sign, are larger."""


def check_file(path: Path, entry: Mapping[str, Any], *, verify: bool) -> None:
    """Raise ValueError, naming the file, unless it is the one that the manifest describes.

    verify: compare the checksum too, which reads the whole file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, though the manifest names it; trace it again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(
            f"{path} is truncated or changed: {size} bytes, but the manifest says "
            f"{entry['bytes']}; trace it again"
        )
    if verify and "sha256" in entry and _sha256(path) != entry["sha256"]:
        raise ValueError(f"{path} does not match its checksum; trace it again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tensors(
    tensors: Mapping[str, np.ndarray],
    entry: Mapping[str, Any],
    stack: Stack,
    *,
    num_labels: int,
    with_weights: bool,
    lookahead: Mapping[str, int],
    extras: Extras,
) -> None:
    """Raise ValueError unless dtypes, shapes, offsets and labels are those of the manifest."""
    T, D = entry["tokens"], entry["documents"]
    L, K = stack.num_layers, stack.top_k
    experts = "uint8" if stack.num_experts <= 256 else "uint16"
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_ids": ("int32", (T,)),
        "experts": (experts, (T, L, K)),
        "phase": ("uint8", (T,)),
        "doc_offsets": ("int64", (D + 1,)),
        "doc_labels": ("int32", (D,)),
    }
    if with_weights:
        expected["weights"] = ("float16", (T, L, K))
    expected |= extras.expected(T, L, experts)
    for name, (dtype, shape) in expected.items():
        _check_tensor(tensors, name, dtype, shape)
    for name, depth in lookahead.items():
        named = _shape(tensors, f"{PREFIX}.{name}.experts")[3:]
        for field, dtype in (("experts", experts), ("scores", "float16")):
            _check_tensor(tensors, f"{PREFIX}.{name}.{field}", dtype, (T, L, depth, *named))
    offsets, labels = tensors["doc_offsets"], tensors["doc_labels"]
    if offsets[0] != 0 or offsets[-1] != T or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError(f"doc_offsets do not rise from 0 to its {T} tokens")
    if D and (labels.min() < 0 or labels.max() >= num_labels):
        raise ValueError(f"doc_labels are not within the {num_labels} labels of the manifest")


def _shape(tensors: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"it lacks the tensor {name}")
    return tensors[name].shape


def _check_tensor(
    tensors: Mapping[str, np.ndarray], name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    if _shape(tensors, name) != shape or tensors[name].dtype != dtype:
        tensor = tensors[name]
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, but should be {dtype} {list(shape)}"
        )


def check_values(tensors: Mapping[str, np.ndarray], stack: Stack, vocab_size: int) -> None:
    """Raise ValueError for tokens, phases or experts that cannot be, and for NaN.

    Every id of an expert must be of its layer, or the highest value of the dtype: no expert.
    """
    if not len(tensors["token_ids"]):
        return
    ids = tensors["token_ids"]
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"token_ids are not within the vocabulary of {vocab_size}")
    if tensors["phase"].max() > LARGEST_PHASE:
        raise ValueError(f"phase is {tensors['phase'].max()}, neither prompt nor generated")
    sizes_L = np.array([layer.num_experts for layer in stack.layers])
    for name in ("experts", f"{ROUTER}.experts"):
        if name in tensors:
            _check_experts(tensors[name].swapaxes(0, 1), sizes_L, stack)
    for name, values in tensors.items():
        if values.dtype == np.float16 and _has_nan(values):
            raise ValueError(f"{name} holds NaN")


def _check_experts(experts_LTK: np.ndarray, sizes_L: np.ndarray, stack: Stack) -> None:
    nothing = np.iinfo(experts_LTK.dtype).max
    for layer, (experts_TK, size) in enumerate(zip(experts_LTK, sizes_L, strict=True)):
        if size > nothing:
            continue
        wrong = (experts_TK >= size) & (experts_TK != nothing)
        if wrong.any():
            raise ValueError(
                f"experts of {stack.layers[layer].name} name expert {experts_TK[wrong][0]}, but "
                f"the layer has {size}"
            )


def _has_nan(values: np.ndarray) -> bool:
    bits = values.view(np.uint16) & 0x7FFF
    return bool(bits.size) and int(bits.max()) > FLOAT16_INFINITY
