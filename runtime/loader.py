"""From an id, a directory or a module to a model whose experts lie in a store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from routing.layers import MoELayer, find_moe_layers
from routing.topology import Topology, topology_of
from runtime.arena import Specs
from runtime.checkpoint import CheckpointFiles, CheckpointStore
from runtime.store import ExpertStore, ModuleStore, expert_parameters


class Group(NamedTuple):
    """Layers whose experts have one shape, and so share slots."""

    specs: Specs
    layers: list[int]


class Source(NamedTuple):
    """A model ready to be offloaded."""

    model: nn.Module
    topology: Topology
    layers: list[MoELayer]
    store: ExpertStore

    @property
    def groups(self) -> list[Group]:
        """The layers by the shape of their experts."""
        groups: list[Group] = []
        for layer in range(len(self.layers)):
            specs = self.store.specs(layer)
            group = next((group for group in groups if group.specs == specs), None)
            if group is None:
                groups.append(Group(specs, [layer]))
            else:
                group.layers.append(layer)
        return groups

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the weights other than routed experts, each shared tensor once."""
        experts = {id(p) for layer in self.layers for _, p in expert_parameters(layer)}
        others = {id(p): p for p in self.model.parameters() if id(p) not in experts}
        return sum(p.numel() * p.element_size() for p in others.values())


def from_module(model: nn.Module, tokenizer: Any) -> Source:
    """A model that is in memory already; its own tensors are the host tier."""
    if "expertflow" in model.__dict__:
        raise ValueError("this model is offloaded already; call model.expertflow.detach() first")
    topology = topology_of(model, tokenizer)
    layers = find_moe_layers(model)
    return Source(model, topology, layers, ModuleStore(layers))


def from_path(path: str | Path, tokenizer: Any, dtype: str | torch.dtype) -> Source:
    """A checkpoint directory (or hub id), built without its experts where their layout is fused.

    Raises ValueError for a directory without a usable configuration or weights.
    """
    directory = _directory(path)
    stock_class, config = _architecture(directory)
    with torch.device("meta"):
        stock = stock_class(config)
    tokenizer = tokenizer or _tokenizer(directory)
    topology = topology_of(stock, tokenizer)
    stock_layers = find_moe_layers(stock)
    CheckpointFiles(directory)  # refuse a missing or truncated file before anything is built
    if any(layer.kind != "fused" for layer in stock_layers):
        model = _read(stock_class, directory, dtype)
        layers = find_moe_layers(model)
        return Source(model, topology, layers, ModuleStore(layers))
    classes = {type(layer.module) for layer in stock_layers}
    with _stripped(classes):
        model = _read(stock_class, directory, dtype)
    layers = [layer._replace(module=_unstrip(model, layer)) for layer in stock_layers]
    return Source(model, topology, layers, CheckpointStore(directory, stock, layers, model.dtype))


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or str(path).startswith("."):
        raise ValueError(f"there is no model directory {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model"])
        )
    except Exception as error:  # the hub client raises many kinds, none of them ours to tell apart
        raise ValueError(
            f"{path} is neither a directory nor a model the hub hands out ({_brief(error)})"
        ) from error


def _architecture(directory: Path) -> tuple[Any, Any]:
    import transformers

    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is not a model directory: it has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / 'config.json'} cannot be used: {_brief(error)}") from error
    name = (config.architectures or ["?"])[0]
    stock_class = getattr(transformers, name, None)
    if stock_class is None:
        raise ValueError(f"{directory / 'config.json'}: transformers has no architecture {name}")
    return stock_class, config


def _tokenizer(directory: Path) -> Any:
    """The directory's tokenizer, or None where it has none."""
    from transformers import AutoTokenizer

    if not any(directory.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ValueError(f"the tokenizer in {directory} cannot be used: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    """The message of another library, in one line of bearable length."""
    return f"{' '.join(str(error).split()):.300}"


def _read(stock_class: Any, directory: Path, dtype: str | torch.dtype) -> Any:
    """`from_pretrained` that refuses what the library would fill with random numbers."""
    with _errors_only():
        model, found = stock_class.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    for name in sorted(found["missing_keys"]):
        raise ValueError(f"{directory} has no weights for {name}")
    for name, shape, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{directory}: {name} has shape {tuple(shape)}, but the model needs {tuple(expected)}"
        )
    return model


@contextmanager
def _stripped(classes: set[type[nn.Module]]) -> Iterator[None]:
    """While active, the modeling modules build these experts classes without their parameters."""
    try:
        for experts_class in classes:
            setattr(
                sys.modules[experts_class.__module__], experts_class.__name__, _strip(experts_class)
            )
        yield
    finally:
        for experts_class in classes:
            setattr(sys.modules[experts_class.__module__], experts_class.__name__, experts_class)


def _strip(experts_class: type[nn.Module]) -> type[nn.Module]:
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            experts_class.__init__(self, *args, **kwargs)
        for name in list(self._parameters):
            del self._parameters[name]
            setattr(self, name, torch.empty(0))  # transformers' weight initialisation looks at it

    return type(experts_class.__name__, (experts_class,), {"__init__": __init__})


def _unstrip(model: nn.Module, layer: MoELayer) -> nn.Module:
    module = model.get_submodule(layer.name)
    module.__class__ = type(layer.module)
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
