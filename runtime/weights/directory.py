"""A model directory, and what it holds besides weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from routing.layers import MoELayer, find_moe_layers
from routing.pretrained import CONFIG, brief, model_class, read_config, read_tokenizer
from runtime.weights.quantised.quantization import require_known, take_quantization
from runtime.weights.repository.refusals import require_model


class MetaModel(NamedTuple):
    """A model on the meta device: shapes and names, but no weights."""

    model: nn.Module
    layers: list[MoELayer]
    quantization: dict[str, Any] | None = None
    """How the weights in the directory are quantised; the model itself is not."""

    @classmethod
    def of(cls, directory: Path) -> MetaModel:
        """Build the model that `config.json` describes.

        Raises ValueError for a configuration that is missing or unusable, and for an unknown
        quantisation.
        """
        kind, config = _architecture(directory)
        quantization = take_quantization(directory, config)
        if quantization is not None:
            require_known(directory, quantization)
        try:
            with torch.device("meta"):
                model = kind(config)
        except Exception as error:  # sizes that do not fit together fail in any way
            raise ValueError(f"{directory / CONFIG} describes no model: {brief(error)}") from error
        return cls(model, find_moe_layers(model), quantization)


def _architecture(directory: Path) -> tuple[Any, Any]:
    """The class of the model, and its configuration."""
    require_model(directory)
    config = read_config(directory)
    try:
        return model_class(config), config
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory, or None if it has none.

    Raises ValueError for a tokenizer that cannot be loaded.
    """
    return read_tokenizer(directory) if any(directory.glob("tokenizer*")) else None
