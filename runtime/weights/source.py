"""From an id, a directory or a module to a model whose experts lie in a store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from routing.inspect_model import model_class, topology_of
from routing.layers import MoELayer, find_moe_layers
from routing.topology import Topology
from runtime.weights.arena import Specs
from runtime.weights.checkpoint_store import CheckpointStore, FileStore
from runtime.weights.files import CheckpointFiles
from runtime.weights.mapping import Mapping
from runtime.weights.memory_store import MemoryStore
from runtime.weights.prepared_store import BLOCKS, RESIDENT, VARIANT, PreparedStore, is_prepared
from runtime.weights.skeleton import read_weights, stripped, unstrip
from runtime.weights.store import ExpertStore, ModuleStore, expert_parameters

FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", BLOCKS]
"""Of a model on the Hub."""


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
        experts = {id(p) for layer in self.layers for p in expert_parameters(layer).values()}
        others = {id(p): p for p in self.model.parameters() if id(p) not in experts}
        return sum(p.numel() * p.element_size() for p in others.values())


def from_module(model: nn.Module, tokenizer: Any) -> Source:
    """A model that is in memory already; its own tensors are the host tier."""
    if "expertflow" in model.__dict__:
        raise ValueError("this model is offloaded already; call model.expertflow.detach() first")
    topology = topology_of(model, tokenizer)
    layers = find_moe_layers(model)
    return Source(model, topology, layers, ModuleStore(layers))


def from_path(
    path: str | Path, tokenizer: Any, dtype: str | torch.dtype, *, in_memory: bool = False
) -> Source:
    """A checkpoint directory (or hub id), built without its experts.

    in_memory: read all experts now, instead of each when it is missed.

    Raises ValueError for a directory without a usable configuration or weights.
    """
    directory = find_directory(path)
    stock = Stock.of(directory)
    tokenizer = tokenizer or _tokenizer(directory)
    topology = topology_of(stock.model, tokenizer)
    variant = VARIANT if is_prepared(directory) else None
    open_store = store_opener(directory, stock)
    with stripped(stock.layers):
        model = read_weights(type(stock.model), directory, dtype, variant)
    layers = [layer._replace(module=unstrip(model, layer)) for layer in stock.layers]
    store = open_store(layers, model.dtype)
    return Source(model, topology, layers, MemoryStore(store) if in_memory else store)


def sketch(path: str | Path) -> Source:
    """What `from_path` makes of a directory or hub id, on the meta device: sizes, but no weights.

    Raises ValueError as `from_path` does.
    """
    directory = find_directory(path)
    stock = Stock.of(directory)
    config: Any = stock.model.config
    dtype = config.dtype or config.get_text_config().dtype
    store = store_opener(directory, stock)(stock.layers, dtype)
    stock.model.to(next(iter(store.specs(0).values())).dtype)
    return Source(stock.model, topology_of(stock.model), stock.layers, store)


def store_opener(directory: Path, stock: Stock) -> Callable[..., FileStore]:
    """Looks at the files of `directory`; what it returns makes a store of layers and a dtype.

    Raises ValueError for files that are missing, damaged, or not this model's.
    """
    if is_prepared(directory):
        CheckpointFiles(directory, RESIDENT)
        return partial(PreparedStore, directory, stock.layers)
    _refuse_tied(stock)
    files = CheckpointFiles(directory)
    return partial(CheckpointStore, files, Mapping(files, stock.model), stock.layers)


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
        return Path(snapshot_download(str(path), allow_patterns=FETCHED))
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
