"""A model built without its experts, and its other weights read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routing.layers import MoELayer
from runtime.weights.store import expert_parameters


def read_weights(
    stock_class: Any, directory: Path, dtype: str | torch.dtype, variant: str | None
) -> Any:
    """`from_pretrained` that refuses what the library would fill with random numbers."""
    with _errors_only():
        model, found = stock_class.from_pretrained(
            directory,
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
    _own(model)
    return model


def _own(model: nn.Module) -> None:
    """Copy the weights: the library leaves them pages of the file, which somebody might shorten."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


@contextmanager
def stripped(layers: list[MoELayer]) -> Iterator[None]:
    """While active, the modeling modules build these layers' classes without expert parameters."""
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
            setattr(owner, name, torch.empty(0))  # transformers' weight initialisation looks at it

    return type(original.__name__, (original,), {"__init__": __init__})


def unstrip(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The live container of `layer`, of its own class again; without parameters, as if taken."""
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
    """Keep transformers from listing every expert tensor that it did not load."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
