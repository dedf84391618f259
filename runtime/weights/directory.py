"""A model directory, local or fetched from the Hub, and what it holds besides weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from routing.layers import MoELayer, find_moe_layers
from routing.pretrained import CONFIG, brief, model_class, read_config, read_tokenizer
from runtime.weights.prepared_store import BLOCKS

FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", BLOCKS]
"""Patterns of the files that are fetched from the Hub."""


class MetaModel(NamedTuple):
    """A model on the meta device: shapes and names, but no weights."""

    model: nn.Module
    layers: list[MoELayer]

    @classmethod
    def of(cls, directory: Path) -> MetaModel:
        """Build the model that `config.json` describes.

        Raises ValueError for a configuration that is missing, unusable or quantised.
        """
        kind, config = _architecture(directory)
        with torch.device("meta"):
            model = kind(config)
        return cls(model, find_moe_layers(model))


def find_directory(path: str | Path) -> Path:
    """Return a local directory as it is; fetch the model of a Hub id.

    Raises ValueError when `path` is neither.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or str(path).startswith("."):
        raise ValueError(f"there is no model directory {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=FETCHED))
    except Exception as error:  # the Hub's client raises many kinds, and all mean the same here
        raise ValueError(
            f"{path} is neither a directory nor a model the hub hands out ({brief(error)})"
        ) from error


def _architecture(directory: Path) -> tuple[Any, Any]:
    """The class of the model, and its configuration."""
    config = read_config(directory)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise ValueError(f"{directory} is quantised ({brief(quantization)}): not supported")
    try:
        return model_class(config), config
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory, or None if it has none.

    Raises ValueError for a tokenizer that cannot be loaded.
    """
    return read_tokenizer(directory) if any(directory.glob("tokenizer*")) else None
