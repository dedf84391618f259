"""A model built without its experts, and the store that holds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from routing.inspect_model import topology_of
from routing.layers import MoELayer, find_moe_layers
from routing.topology import Topology
from runtime.weights.arena import Specs
from runtime.weights.checkpoint_store import CheckpointStore
from runtime.weights.directory import MetaModel, find_directory, load_tokenizer
from runtime.weights.files import CheckpointFiles
from runtime.weights.mapping import CheckpointMapping
from runtime.weights.memory_store import MemoryStore
from runtime.weights.prepared_store import RESIDENT, VARIANT, PreparedStore, is_prepared
from runtime.weights.skeleton import read_weights, stripped, unstrip
from runtime.weights.store import ExpertStore, ModuleStore, SkeletonStore, expert_parameters


class ShapeGroup(NamedTuple):
    """MoE layers whose experts have one shape and share one arena of slots."""

    specs: Specs
    """Shapes and dtypes of one expert."""
    layers: list[int]
    """Indices of the MoE layers."""


class Source(NamedTuple):
    """A model that is ready to be offloaded."""

    model: nn.Module
    topology: Topology
    layers: list[MoELayer]
    store: ExpertStore

    @property
    def groups(self) -> list[ShapeGroup]:
        """The MoE layers, grouped by the shape of their experts."""
        groups: list[ShapeGroup] = []
        for layer in range(len(self.layers)):
            specs = self.store.specs(layer)
            group = next((group for group in groups if group.specs == specs), None)
            if group is None:
                groups.append(ShapeGroup(specs, [layer]))
            else:
                group.layers.append(layer)
        return groups

    @property
    def fixed_bytes(self) -> int:
        """Bytes of all weights but the routed experts; tied tensors count once."""
        experts = {id(p) for layer in self.layers for p in expert_parameters(layer).values()}
        others = {id(p): p for p in self.model.parameters() if id(p) not in experts}
        return sum(p.numel() * p.element_size() for p in others.values())


def from_module(model: nn.Module, tokenizer: Any) -> Source:
    """A model that is in memory already; its own tensors become the host tier.

    Raises ValueError for a model that is offloaded already.
    """
    if "expertflow" in model.__dict__:
        raise ValueError("this model is offloaded already; call model.expertflow.detach() first")
    topology = topology_of(model, tokenizer)
    layers = find_moe_layers(model)
    return Source(model, topology, layers, ModuleStore(layers))


def from_path(
    path: str | Path, tokenizer: Any, dtype: str | torch.dtype, *, in_memory: bool = False
) -> Source:
    """The model of a checkpoint directory or a Hub id, built without its experts.

    in_memory: read all experts now, instead of reading each when it is missed.
    Raises ValueError for a directory without a usable configuration or weights.
    """
    directory = find_directory(path)
    meta = MetaModel.of(directory)
    tokenizer = tokenizer or load_tokenizer(directory)
    topology = topology_of(meta.model, tokenizer)
    variant = VARIANT if is_prepared(directory) else None
    open_store = store_opener(directory, meta)
    with stripped(meta.layers):
        model = read_weights(type(meta.model), directory, dtype, variant)
    layers = [layer._replace(module=unstrip(model, layer)) for layer in meta.layers]
    store = open_store(layers, model.dtype)
    return Source(model, topology, layers, MemoryStore(store) if in_memory else store)


def from_path_on_meta(path: str | Path) -> Source:
    """What `from_path` would return, on the meta device: sizes without any weights.

    Raises ValueError as `from_path` does.
    """
    directory = find_directory(path)
    meta = MetaModel.of(directory)
    config: Any = meta.model.config
    dtype = config.dtype or config.get_text_config().dtype
    store = store_opener(directory, meta)(meta.layers, dtype)
    meta.model.to(next(iter(store.specs(0).values())).dtype)
    return Source(meta.model, topology_of(meta.model), meta.layers, store)


def store_opener(directory: Path, meta: MetaModel) -> Callable[..., SkeletonStore]:
    """Check the files of `directory`, and return a function that opens their store.

    The function takes the live layers and the dtype in which experts are handed out.
    Raises ValueError for files that are missing, damaged, or of another model.
    """
    if is_prepared(directory):
        CheckpointFiles(directory, RESIDENT)
        return partial(PreparedStore, directory, meta.layers)
    _refuse_tied(meta)
    files = CheckpointFiles(directory)
    return partial(CheckpointStore, files, CheckpointMapping(files, meta.model), meta.layers)


def _refuse_tied(meta: MetaModel) -> None:
    """Raise ValueError if layers share the tensors of their experts."""
    for layer in meta.layers:
        for path in expert_parameters(layer):
            if f"{layer.name}.{path}" in meta.model.all_tied_weights_keys:  # type: ignore[operator]
                raise ValueError(
                    f"{type(meta.model).__name__} shares the experts of {layer.name} with another "
                    "layer: load it whole, and pass the model instead of its directory"
                )
