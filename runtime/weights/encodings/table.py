"""All encodings, and the matrices of a checkpoint that are in one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch

from runtime.weights.encodings import fp8_block, int4_group, mxfp4, nvfp4
from runtime.weights.encodings.encoding import Encoding
from runtime.weights.encodings.fp8_block import FP8Block
from runtime.weights.encodings.int4_group import Int4Group
from runtime.weights.encodings.mxfp4 import MXFP4
from runtime.weights.encodings.nvfp4 import NVFP4
from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.files import DTYPES, Entry

ENCODINGS: dict[str, type[Encoding]] = {
    kind.name: kind for kind in (MXFP4, FP8Block, Int4Group, NVFP4)
}
"""By the name that users see."""

FINDERS: tuple[ModuleType, ...] = (mxfp4, fp8_block, int4_group, nvfp4)
"""Modules with a function `find`, and the quantisation METHODS whose checkpoints it knows."""

Find = Callable[[Mapping[str, Entry], Mapping[str, Any]], dict[str, StoredMatrix]]

CODED_ENDINGS = (".weight", ".qweight", "_packed", "_blocks", "_proj")
"""Endings of the names of tensors that are weights."""


def find_all(
    entries: Mapping[str, Entry], quantization: Mapping[str, Any]
) -> dict[str, StoredMatrix]:
    """The coded matrices of a checkpoint, by the key that they would have unquantised.

    quantization: `quantization_config` of config.json, or the content of hf_quant_config.json.
    Raises ValueError, naming the method or the tensor, for what no encoding stands for.
    """
    quantization = normalised(quantization)
    method = quantization["quant_method"]
    finders = [module for module in FINDERS if method in module.METHODS]
    if not finders:
        known = sorted({name for module in FINDERS for name in module.METHODS})
        raise ValueError(
            f"the quantisation {method} is not supported (of those that are: {', '.join(known)}); "
            "use the unquantised model, or one in mxfp4, fp8, int4 or nvfp4"
        )
    found: dict[str, StoredMatrix] = {}
    for module in finders:
        matrices: dict[str, StoredMatrix] = module.find(entries, quantization)
        assert not found.keys() & matrices.keys(), "a matrix has one encoding"
        found |= matrices
    _require_all_known(entries, found, method)
    return found


def normalised(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The quantisation with its method, which older and ModelOpt's own files name elsewhere.

    Raises ValueError for one that names none, or that changes more than the weights.
    """
    plain = dict(quantization)
    if isinstance(plain.get("quantization"), Mapping):  # hf_quant_config.json
        plain = {"quant_method": "modelopt", **plain["quantization"]}
    if plain.get("load_in_4bit") or plain.get("load_in_8bit"):
        plain["quant_method"] = "bitsandbytes"
    method = plain.get("quant_method")
    if not isinstance(method, str):
        raise ValueError("quantization_config names no quant_method; fetch config.json again")
    if method.startswith("modelopt"):  # some name the algorithm too
        plain["quant_method"] = "modelopt"
    groups = plain.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(map(_is_group, groups.values())):
        raise ValueError(f"config_groups of the quantisation {method} are damaged: {groups!s:.200}")
    for name in ("transform_config", "sparsity_config"):
        if _is_used(plain.get(name)):
            raise ValueError(f"{name} of the quantisation {method} is not supported")
    return plain


def _is_group(group: Any) -> bool:
    """True for a group of matrices that are quantised in one way."""
    return isinstance(group, Mapping) and isinstance(group.get("weights") or {}, Mapping)


def _is_used(settings: Any) -> bool:
    """True for settings of a transformation or of sparsity that are not empty."""
    if not isinstance(settings, Mapping):
        return bool(settings)
    if "format" in settings:
        return bool(settings["format"] != "dense")
    return any(bool(value) for value in settings.values())


def _require_all_known(
    entries: Mapping[str, Entry], found: Mapping[str, StoredMatrix], method: str
) -> None:
    """Raise ValueError for a weight that is stored twice, or in codes that no encoding has."""
    sources = {key for matrix in found.values() for key in matrix.sources.values()}
    for key in found.keys() & entries.keys() - sources:
        raise ValueError(f"{key} is there as it is and in codes; remove the one that is not meant")
    for key, entry in entries.items():
        if key not in sources and entry.dtype not in DTYPES and key.endswith(CODED_ENDINGS):
            raise ValueError(
                f"{key} is stored as {entry.dtype}: no known layout of the quantisation {method}"
            )


def to_json(encoding: Encoding) -> dict[str, Any]:
    """An encoding as JSON can have it."""
    values = {field.name: getattr(encoding, field.name) for field in fields(encoding)}
    return {"name": encoding.name} | {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in values.items()
    }


def from_json(written: Mapping[str, Any]) -> Encoding:
    """The encoding that `to_json` wrote. Raises ValueError, naming it, for an unknown one."""
    values = dict(written)
    name = values.pop("name", None)
    if name not in ENCODINGS:
        raise ValueError(f"the encoding {name} is none of {', '.join(sorted(ENCODINGS))}")
    kind = ENCODINGS[name]
    dtypes = {field.name for field in fields(kind) if isinstance(field.default, torch.dtype)}
    try:
        return kind(**{k: getattr(torch, v) if k in dtypes else v for k, v in values.items()})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the encoding {name} is damaged: {written} ({error})") from error
