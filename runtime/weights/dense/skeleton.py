"""The skeleton of a model: built without its experts, all other weights read from files.

transformers builds it, as a subclass of the model's own class that drops the experts' parameters
while they are still on the meta device. Nothing is replaced that other threads use: neither the
library's classes nor torch's default number format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from routing.layers import MoELayer
from routing.pretrained import CONFIG, brief
from runtime.weights.dense.default_dtype import default_dtype
from runtime.weights.quantised.coded_files import StoredTensor
from runtime.weights.store import expert_parameters


def build_skeleton(
    model_class: Any,
    config: Any,
    layers: list[MoELayer],
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    attention: str | None = None,
) -> Any:
    """`from_pretrained`, but refusing what the library would fill with random numbers.

    layers: the MoE layers of the model on the meta device.
    tensors: the checkpoint's tensors, without those of the experts.
    Raises ValueError naming the tensor that is missing or has another shape.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    model, found = _without_experts(model_class, layers, dtype).from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        generation_config=_generation_config(directory),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    model.__class__ = model_class
    model.config._name_or_path = model.name_or_path = str(directory)
    for name in sorted(found["missing_keys"]):
        raise ValueError(f"{directory} has no weights for {name}")
    for name, shape, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{directory}: {name} has shape {tuple(shape)}, but the model needs {tuple(expected)}"
        )
    return model


def _generation_config(directory: Path) -> Any:
    """The directory's generation settings, or those of its `config.json`, as transformers does.

    Raises ValueError for a file that cannot be used.
    """
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    name = file.name if file.is_file() else CONFIG
    options: dict[str, Any] = {} if file.is_file() else {"_from_model_config": True}
    try:
        return GenerationConfig.from_pretrained(directory, config_file_name=name, **options)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / name} cannot be used: {brief(error)}") from error


def _without_experts(model_class: Any, layers: list[MoELayer], dtype: torch.dtype) -> Any:
    """A subclass whose instances are built on the meta device, by this thread alone."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        floating = default_dtype(dtype, model_class.__module__)
        with torch.device("meta"), floating, _parts_without_dtype(config):
            model_class.__init__(self, config, *args, **kwargs)
        for layer in layers:
            _strip(self.get_submodule(layer.name), layer)

    def get_init_context(*_: Any, **__: Any) -> list[Any]:
        return []  # the library's own contexts change torch and transformers for all threads

    body = {
        "__init__": __init__,
        "get_init_context": classmethod(get_init_context),
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (model_class,), body)


@contextmanager
def _parts_without_dtype(config: Any) -> Iterator[None]:
    """A context in which a part of the model is built without setting torch's default format."""
    parts = list(_sub_configs(config))
    before = [part.dtype for part in parts]
    try:
        for part in parts:
            part.dtype = None
        yield
    finally:
        for part, dtype in zip(parts, before, strict=True):
            part.dtype = dtype


def _sub_configs(config: Any) -> Iterator[Any]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield part
            yield from _sub_configs(part)


def _strip(module: nn.Module, layer: MoELayer) -> None:
    for path in expert_parameters(layer._replace(module=module)):
        holder, _, name = path.rpartition(".")
        owner = module.get_submodule(holder)
        del owner._parameters[name]
        setattr(owner, name, torch.empty(0))  # read by transformers' weight initialisation


def unstrip(model: nn.Module, layer: MoELayer) -> nn.Module:
    """Return the live container of `layer`, with no expert parameters, as after `take`."""
    module = model.get_submodule(layer.name)
    for path in expert_parameters(layer):
        holder, _, name = path.rpartition(".")
        owner = module.get_submodule(holder)
        del owner.__dict__[name]
        owner._parameters[name] = None
    return module
