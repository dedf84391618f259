"""From an id, a directory or a module to a model whose experts lie in a store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from routing.architecture import model_class
from routing.layers import MoELayer, find_moe_layers
from routing.topology import Topology, topology_of
from runtime.arena import Specs
from runtime.checkpoint import CheckpointStore
from runtime.files import CheckpointFiles
from runtime.mapping import Mapping
from runtime.store import ExpertStore, ModuleStore, expert_parameters


class Group(NamedTuple):
    """Layers whose experts have one shape, and so share slots."""

    specs: Specs
    layers: list[int]


def grouped(specs: list[Specs]) -> list[Group]:
    """Layers by the shape of their experts; `specs` are each layer's."""
    groups: list[Group] = []
    for layer, layer_specs in enumerate(specs):
        group = next((group for group in groups if group.specs == layer_specs), None)
        if group is None:
            groups.append(Group(layer_specs, [layer]))
        else:
            group.layers.append(layer)
    return groups


class Source(NamedTuple):
    """A model ready to be offloaded."""

    model: nn.Module
    topology: Topology
    layers: list[MoELayer]
    store: ExpertStore

    @property
    def groups(self) -> list[Group]:
        """The layers by the shape of their experts."""
        return grouped([self.store.specs(layer) for layer in range(len(self.layers))])

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the weights other than routed experts, each shared tensor once."""
        return sum(p.numel() * p.element_size() for p in other_parameters(self.model, self.layers))


def other_parameters(model: nn.Module, layers: list[MoELayer]) -> list[nn.Parameter]:
    """The parameters that are not routed experts', each shared one once."""
    experts = {id(p) for layer in layers for p in expert_parameters(layer).values()}
    others = {id(p): p for p in model.parameters() if id(p) not in experts}
    return list(others.values())


def from_module(model: nn.Module, tokenizer: Any) -> Source:
    """A model that is in memory already; its own tensors are the host tier."""
    if "expertflow" in model.__dict__:
        raise ValueError("this model is offloaded already; call model.expertflow.detach() first")
    topology = topology_of(model, tokenizer)
    layers = find_moe_layers(model)
    return Source(model, topology, layers, ModuleStore(layers))


def from_path(path: str | Path, tokenizer: Any, dtype: str | torch.dtype) -> Source:
    """A checkpoint directory (or hub id), built without its experts.

    Raises ValueError for a directory without a usable configuration or weights.
    """
    directory = find_directory(path)
    stock = Stock.of(directory)
    tokenizer = tokenizer or _tokenizer(directory)
    topology = topology_of(stock.model, tokenizer)
    files = CheckpointFiles(directory)
    mapping = Mapping(files, stock.model)
    _refuse_tied(stock)
    with _stripped(stock.layers):
        model = _read(type(stock.model), directory, dtype)
    layers = [layer._replace(module=_unstrip(model, layer)) for layer in stock.layers]
    store = CheckpointStore(files, mapping, stock.layers, layers, model.dtype)
    return Source(model, topology, layers, store)


def _refuse_tied(stock: Stock) -> None:
    for layer in stock.layers:
        for path in expert_parameters(layer):
            if f"{layer.name}.{path}" in stock.model.all_tied_weights_keys:  # type: ignore[operator]
                raise ValueError(
                    f"{type(stock.model).__name__} shares the experts of {layer.name} with another "
                    "layer: load it whole, and pass the model instead of its directory"
                )


class Stock(NamedTuple):
    """The model of a checkpoint directory on the meta device: shapes and names, no weights."""

    model: nn.Module
    layers: list[MoELayer]

    @classmethod
    def of(cls, directory: Path) -> Stock:
        """Raises ValueError for a configuration that cannot be used."""
        stock_class, config = _architecture(directory)
        with torch.device("meta"):
            model = stock_class(config)
        return cls(model, find_moe_layers(model))


def find_directory(path: str | Path) -> Path:
    """A directory as it is, or a hub id's, fetched. Raises ValueError where there is neither."""
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
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise ValueError(f"{directory} is quantised ({_brief(quantization)}): not supported")
    try:
        return model_class(config), config
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error


def _tokenizer(directory: Path) -> Any:
    """The directory's tokenizer, or None where it has none."""
    from transformers import AutoTokenizer

    if not any(directory.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ValueError(f"the tokenizer in {directory} cannot be used: {_brief(error)}") from error


def _brief(error: object) -> str:
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
    _own(model)
    return model


def _own(model: nn.Module) -> None:
    """Copy the weights: the library leaves them pages of the file, which somebody might shorten."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


@contextmanager
def _stripped(layers: list[MoELayer]) -> Iterator[None]:
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


def _unstrip(model: nn.Module, layer: MoELayer) -> nn.Module:
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
