"""A checkpoint of random codes in the tensor layout of published ones, a file a layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.coded_models import draw
from benchmarks.common.shapes import NO_TOKENS, Shape, empty_model, shape_named
from routing.layers import find_moe_layers
from runtime.weights.encodings.encoding import CODES, SCALES

SHAPE_OF = {"mxfp4": "gpt-oss-120b", "fp8": "qwen3-30b-a3b"}
"""The model whose layout a checkpoint of this encoding has."""
QUANTIZATION: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4"},
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
          "F32": torch.float32}  # fmt: skip
POOL = 1 << 26
"""Random numbers of a kind; longer tensors repeat them."""

Entries = dict[str, tuple[str, tuple[int, ...]]]
"""The number format and the shape of tensors, by key."""


def write_coded(
    directory: Path, encoding: str, num_bytes: float, shape: Shape | None = None
) -> int:
    """Write a checkpoint with about `num_bytes` of experts. Returns the bytes of its files.

    shape: in place of the encoding's own. Raises ValueError for an encoding without a layout here.
    """
    if encoding not in SHAPE_OF:
        raise ValueError(f"encoding={encoding!r} is not one of {', '.join(SHAPE_OF)}")
    shape = shape or shape_named(SHAPE_OF[encoding])
    one = replace(shape, options=shape.options | {"num_hidden_layers": 1})
    layer_bytes = sum(
        _size(entry) for key, entry in _entries(one, encoding).items() if ".experts." in key
    )
    layers = max(1, round(num_bytes / layer_bytes))
    whole = replace(shape, options=shape.options | {"num_hidden_layers": layers})
    directory.mkdir(parents=True, exist_ok=True)
    _write_config(directory, whole, encoding)
    pools = _Pools(encoding)
    files = list(_files(_entries(whole, encoding)))
    for index, entries in enumerate(files):
        _write_file(directory / _name(index), entries, pools)
    weight_map = {key: _name(i) for i, entries in enumerate(files) for key in entries}
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in directory.iterdir())


def _name(index: int) -> str:
    return f"model-{index:05}.safetensors"


def _write_config(directory: Path, shape: Shape, encoding: str) -> None:
    from transformers import AutoConfig

    kind = type(empty_model(shape)).__name__
    options = shape.options | NO_TOKENS | {"architectures": [kind]}
    config = AutoConfig.for_model(shape.model_type, **options)
    config.dtype = torch.bfloat16
    config.quantization_config = QUANTIZATION[encoding]
    config.save_pretrained(directory)


def _entries(shape: Shape, encoding: str) -> Entries:
    """All tensors of the checkpoint, those of a layer together."""
    model = empty_model(shape)
    experts = tuple(f"{layer.name}." for layer in find_moe_layers(model))
    entries: Entries = {}
    for name, parameter in model.named_parameters():
        size = tuple(parameter.shape)
        if not name.startswith(experts) or name.endswith("_bias"):
            entries[name] = ("BF16", size)
        elif encoding == "mxfp4":
            entries |= _stacked(name, size)
        else:
            entries |= dict(_single(name, size))
    return entries


def _stacked(name: str, shape: tuple[int, ...]) -> Entries:
    """gpt-oss's layout of a parameter [E, K, N]."""
    experts, columns, rows = shape
    blocks = experts, rows, columns // 32
    return {f"{name}_blocks": ("U8", (*blocks, 16)), f"{name}_scales": ("U8", blocks)}


def _single(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Three matrices an expert, as Qwen's fp8 models have them, of a parameter [E, N, K]."""
    experts, rows, columns = shape
    folder, _, own = name.rpartition(".")
    names = ("gate_proj", "up_proj") if own == "gate_up_proj" else (own,)
    size = rows // len(names), columns
    for expert in range(experts):
        for one in names:
            key = f"{folder}.{expert}.{one}.weight"
            yield key, ("F8_E4M3", size)
            yield f"{key}_scale_inv", ("F32", (-(-size[0] // 128), -(-size[1] // 128)))


def _size(entry: tuple[str, tuple[int, ...]]) -> int:
    return torch.Size(entry[1]).numel() * DTYPES[entry[0]].itemsize


def _files(entries: Entries) -> Iterator[Entries]:
    """The tensors of each layer, then all others."""
    of_layer: dict[str, Entries] = {}
    for key, entry in entries.items():
        words = key.split(".")
        layer = words[words.index("layers") + 1] if "layers" in words else "others"
        of_layer.setdefault(layer, {})[key] = entry
    yield from of_layer.values()


class _Pools:
    """Random bytes of each kind, drawn once."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._generator = torch.Generator().manual_seed(0)
        self._drawn: dict[tuple[str, str], Tensor] = {}

    def bytes_of(self, key: str, kind: str) -> memoryview:
        """Random bytes for a tensor of this name and number format."""
        part = SCALES if "scale" in key else CODES if kind != "BF16" else ""
        if (part, kind) not in self._drawn:
            drawn = draw(self._encoding, part, DTYPES[kind], POOL, self._generator)
            self._drawn[part, kind] = drawn.view(torch.uint8)
        return self._drawn[part, kind].numpy().data


def _write_file(path: Path, entries: Entries, pools: _Pools) -> None:
    """Write a safetensors file straight from the pools, since its tensors share their memory."""
    at, header = 0, {}
    for key, (kind, shape) in entries.items():
        end = at + _size((kind, shape))
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, entry in entries.items():
            pool, missing = pools.bytes_of(key, entry[0]), _size(entry)
            while missing:
                missing -= file.write(pool[:missing])
