"""The skeleton of a model: built without its experts, all other weights read from files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from routing.layers import MoELayer
from runtime.weights.store import expert_parameters

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which PEFT and transformers know an adapter."""


def read_weights(
    model_class: Any, directory: Path, dtype: str | torch.dtype, variant: str | None
) -> Any:
    """`from_pretrained`, but refusing what the library would fill with random numbers.

    variant: of the file names, as in transformers.
    Raises ValueError naming the tensor that is missing or has another shape.
    """
    with _errors_only(), _without_adapter(directory) as base:
        model, found = model_class.from_pretrained(
            base,
            dtype=dtype,
            variant=variant,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for name in sorted(found["missing_keys"]):
        raise ValueError(f"{directory} has no weights for {name}")
    for name, shape, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{directory}: {name} has shape {tuple(shape)}, but the model needs {tuple(expected)}"
        )
    _copy_weights(model)
    model.name_or_path = model.config._name_or_path = str(directory)
    return model


@contextmanager
def _without_adapter(directory: Path) -> Iterator[Path]:
    """The directory as transformers sees it without an adapter, which it would put on by itself.

    An adapter goes on the model with its experts in place: `runtime.engine.guards.adapters`.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        yield directory
        return
    with TemporaryDirectory(prefix="expertflow-") as links:
        for path in directory.iterdir():
            if path.name != ADAPTER_CONFIG:
                (Path(links) / path.name).symlink_to(path.resolve())
        yield Path(links)


def _copy_weights(model: nn.Module) -> None:
    """Give the model its own memory: the library maps the file, which somebody might truncate."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


@contextmanager
def stripped(layers: list[MoELayer]) -> Iterator[None]:
    """A context in which transformers builds the containers of these layers without experts."""
    classes = {type(layer.module): layer for layer in layers}
    try:
        for original, layer in classes.items():
            setattr(sys.modules[original.__module__], original.__name__, _strip(original, layer))
        yield
    finally:
        for original in classes:
            setattr(sys.modules[original.__module__], original.__name__, original)


def _strip(original: type[nn.Module], layer: MoELayer) -> type[nn.Module]:
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            original.__init__(self, *args, **kwargs)
        num_experts = layer.container.num_experts(self)
        for path in expert_parameters(layer._replace(module=self, num_experts=num_experts)):
            holder, _, name = path.rpartition(".")
            owner = self.get_submodule(holder)
            del owner._parameters[name]
            setattr(owner, name, torch.empty(0))  # read by transformers' weight initialisation

    return type(original.__name__, (original,), {"__init__": __init__})


def unstrip(model: nn.Module, layer: MoELayer) -> nn.Module:
    """Return the live container of `layer`, in its own class again.

    It has no expert parameters, as after `ExpertStore.take`.
    """
    module = model.get_submodule(layer.name)
    module.__class__ = type(layer.module)
    for path in expert_parameters(layer):
        holder, _, name = path.rpartition(".")
        owner = module.get_submodule(holder)
        del owner.__dict__[name]
        owner._parameters[name] = None
    return module


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence the warning in which transformers lists every expert tensor it did not load."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
