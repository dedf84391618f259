"""The quantisation that a model directory describes in its configuration, or beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from routing.pretrained import read_json
from runtime.weights.encodings import table
from runtime.weights.encodings.stored_matrix import StoredMatrix
from runtime.weights.files import Entry

FIELDS = ("quantization_config", "compression_config")
"""Fields of a configuration that describe a quantisation."""
METHODS = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""Files beside `config.json` in which quantisers describe their weights, and whose they are."""


def take_quantization(directory: Path, config: Any) -> dict[str, Any] | None:
    """The quantisation of the weights in `directory`, removed from `config`; None if there is none.

    What is built from `config` then is the unquantised model, as transformers' own dequantisation
    leaves it.
    """
    found: dict[str, Any] | None = None
    for part in _with_parts(config):
        for field in FIELDS:
            if (described := part.__dict__.pop(field, None)) is not None:
                found = found or _as_dict(described)
    return found if found is not None else _beside(directory)


def _as_dict(described: Any) -> dict[str, Any]:
    return dict(described if isinstance(described, dict) else described.to_dict())


def _with_parts(config: Any) -> Iterator[Any]:
    """A configuration and those of the model's parts."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _with_parts(part)


def _beside(directory: Path) -> dict[str, Any] | None:
    """A quantisation that only a file of its own describes."""
    for name, method in METHODS.items():
        if (directory / name).is_file():
            return {"quant_method": method} | read_json(directory / name)
    return None


def require_known(directory: Path, quantization: dict[str, Any]) -> None:
    """Raise ValueError, naming the directory, for a quantisation that no encoding stands for."""
    find_all(directory, {}, quantization)


def find_all(
    directory: Path, entries: Mapping[str, Entry], quantization: Mapping[str, Any]
) -> dict[str, StoredMatrix]:
    """The coded matrices among the tensors of `directory`, by their key in its unquantised twin.

    Raises ValueError, naming the directory and the tensor, for what no encoding stands for.
    """
    try:
        return table.find_all(entries, quantization)
    except ValueError as error:
        raise ValueError(f"{directory} is quantised: {error}") from error
