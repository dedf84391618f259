"""A model built without its experts, and the store that holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from routing.inspect_model import topology_of
from routing.layers import MoELayer, find_moe_layers
from routing.pretrained import CONFIG
from routing.topology import Topology
from runtime.weights.arena import Specs, expert_bytes
from runtime.weights.checkpoint_store import CheckpointStore
from runtime.weights.dense.skeleton import build_skeleton, unstrip
from runtime.weights.directory import MetaModel, load_tokenizer
from runtime.weights.encodings.coded import Coding, stored_specs
from runtime.weights.files import DTYPES, CheckpointFiles
from runtime.weights.mapping import CheckpointMapping
from runtime.weights.memory_store import MemoryStore
from runtime.weights.prepared.manifest import RESIDENT, is_prepared
from runtime.weights.prepared.store import PreparedStore
from runtime.weights.quantised.coded_files import CodedFiles, StoredTensor
from runtime.weights.quantised.parts import empty
from runtime.weights.quantised.refusals import without_codes, without_scales
from runtime.weights.repository.hub import (
    HubOptions,
    fetch_headers,
    fetch_weights,
    find_directory,
    needed,
)
from runtime.weights.store import (
    ConfiguredStore,
    ExpertStore,
    ModuleStore,
    SkeletonStore,
    expert_parameters,
)


class ShapeGroup(NamedTuple):
    """MoE layers whose experts have one shape and share one arena of slots."""

    specs: Specs
    """Shapes and dtypes of one expert."""
    layers: list[int]
    """Indices of the MoE layers."""
    coding: Coding = {}  # noqa: RUF012 - never written to
    """The parameters that are kept in codes."""

    @property
    def stored_specs(self) -> Specs:
        """Shapes and dtypes of one expert as it is stored."""
        return stored_specs(self.specs, self.coding)


class Source(NamedTuple):
    """A model that is ready to be offloaded."""

    model: nn.Module
    topology: Topology
    layers: list[MoELayer]
    store: ExpertStore

    @property
    def groups(self) -> list[ShapeGroup]:
        """The MoE layers, grouped by the shape and the encoding of their experts."""
        groups: list[ShapeGroup] = []
        for layer in range(len(self.layers)):
            kind = self.store.specs(layer), self.store.coding(layer)
            group = next((group for group in groups if (group.specs, group.coding) == kind), None)
            if group is None:
                groups.append(ShapeGroup(kind[0], [layer], kind[1]))
            else:
                group.layers.append(layer)
        return groups

    def stored_bytes(self, layer: int) -> int:
        """Bytes of an expert of `layer` as it is stored: in codes, where it has any."""
        return expert_bytes(self.store.stored_specs(layer))

    @property
    def mean_stored_bytes(self) -> float:
        """Bytes of an expert as it is stored, over all layers' experts."""
        counts = [layer.num_experts for layer in self.layers]
        sizes = [self.stored_bytes(layer) * count for layer, count in enumerate(counts)]
        return sum(sizes) / sum(counts)

    @property
    def encoding(self) -> str | None:
        """Names of the encodings of the experts, as users see them; None if they are plain."""
        codings = (self.store.coding(layer) for layer in range(len(self.layers)))
        names = {matrix.encoding.name for coding in codings for matrix in coding.values()}
        return " and ".join(sorted(names)) or None

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
    path: str | Path,
    tokenizer: Any,
    dtype: str | torch.dtype,
    *,
    in_memory: bool = False,
    shared: bool = False,
    hub: HubOptions = HubOptions(),  # noqa: B008 - immutable
    attention: str | None = None,
    accept: Callable[[Topology], None] | None = None,
) -> Source:
    """The model of a checkpoint directory or a Hub id, built without its experts.

    in_memory: read all experts now, instead of reading each when it is missed. shared: let a GPU's
    host tier be shared by the processes of this machine.
    attention: transformers' `attn_implementation`.
    accept: called with the topology before the weights are fetched; it may raise.
    Raises ValueError for a directory without a usable configuration or weights.
    """
    directory = find_directory(path, hub)
    meta = MetaModel.of(directory)
    tokenizer = tokenizer or load_tokenizer(directory)
    topology = topology_of(meta.model, tokenizer)
    if accept is not None:
        accept(topology)
    fetch_weights(path, directory, hub)
    store, tensors = open_weights(directory, meta)
    chosen = _dtype(dtype, meta.model.config, tensors)
    require_floating(directory, tensors, meta.model)
    tensors = {key: tensor._replace(dtype=chosen) for key, tensor in tensors.items()}
    model = build_skeleton(
        type(meta.model), meta.model.config, meta.layers, directory, tensors, chosen, attention
    )
    layers = [layer._replace(module=unstrip(model, layer)) for layer in meta.layers]
    store.bind(layers, model.dtype)
    source = Source(model, topology, layers, store)
    if shared:
        store.shared_as = shared_name(store, directory)
    _try_codes(source)
    return source._replace(store=MemoryStore(store)) if in_memory else source


def shared_name(store: ExpertStore, directory: Path) -> str:
    """The name of the copy that processes share. Raises ValueError for a model that has none."""
    if not isinstance(store, PreparedStore):
        raise ValueError(
            f"host='shared' needs a prepared model, and {directory} is none: `expertflow prepare "
            f"{directory} OUT --packed` writes one"
        )
    return store.identity


def _try_codes(source: Source) -> None:
    """Read an expert of each kind, so that codes in an unknown order are refused at once."""
    for group in source.groups:
        if group.coding:
            source.store.read_stored(group.layers[0], 0, empty(group.stored_specs))


def from_path_on_meta(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    hub: HubOptions = HubOptions(),  # noqa: B008 - immutable
) -> Source:
    """What `from_path` would return, on the meta device: sizes without any weights.

    path: also a `config.json`, or a directory that holds no more. Files of weights are checked
    where they are there. Raises ValueError as `from_path` does.
    """
    file = Path(path).expanduser()
    directory = file.parent if file.name == CONFIG and file.is_file() else find_directory(path, hub)
    meta = MetaModel.of(directory)
    topology = topology_of(meta.model)
    tensors: dict[str, StoredTensor] = {}
    if any(directory.joinpath(name).exists() for name in needed(directory)):
        store, tensors = open_weights(directory, meta)
    elif meta.quantization and (entries := fetch_headers(path, directory, hub)):
        files = CheckpointFiles.unread(directory, entries)
        store, tensors = _open(
            CodedFiles(directory, quantization=meta.quantization, stored=files), meta
        )
    else:
        store = ConfiguredStore(meta.layers, torch.float32, meta.quantization)
    chosen = _dtype(dtype, meta.model.config, tensors)
    store.bind(meta.layers, chosen)
    meta.model.to(chosen)
    return Source(meta.model, topology, meta.layers, store)


def open_weights(directory: Path, meta: MetaModel) -> tuple[SkeletonStore, dict[str, StoredTensor]]:
    """Check the files of `directory`; returns the store of its experts, and all other tensors.

    The store still has to be bound to the live model.
    Raises ValueError for files that are missing, damaged, or of another model.
    """
    if is_prepared(directory):
        files = CodedFiles(directory, RESIDENT, meta.quantization)
        prepared = PreparedStore(directory, meta.layers, meta.layers, None)
        return prepared, {key: StoredTensor(files, key) for key in files.entries}
    return _open(CodedFiles(directory, quantization=meta.quantization), meta)


def _open(files: CodedFiles, meta: MetaModel) -> tuple[SkeletonStore, dict[str, StoredTensor]]:
    """The store of the experts of a checkpoint, and all other tensors."""
    _refuse_tied(meta)
    if meta.quantization is not None and not files.matrices:
        raise ValueError(without_codes(files.directory, meta.quantization))
    mapping = CheckpointMapping(files, meta.model)
    mapping.require_no_more_layers(meta.model)
    store = CheckpointStore(files, mapping, meta.layers, meta.layers, None)
    others = files.entries.keys() - store.keys
    return store, {key: StoredTensor(files, key) for key in sorted(others)}


def _dtype(dtype: str | torch.dtype, config: Any, tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The number format of the model; "auto" is that of its configuration, else of its files.

    Raises ValueError for anything that is none.
    """
    found: Any = dtype
    if dtype == "auto":
        stored = (DTYPES.get(tensor.get_dtype()) for tensor in tensors.values())
        found = config.dtype or config.get_text_config().dtype or next(filter(None, stored), None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if found is None:
        raise ValueError("config.json says no dtype: give dtype=, as 'bfloat16'")
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no floating-point number format of torch")
    return found


def require_floating(directory: Path, tensors: dict[str, StoredTensor], model: nn.Module) -> None:
    """Raise ValueError for a weight that is stored as codes, which are not the weight itself."""
    names = {name for name, p in model.state_dict().items() if p.is_floating_point()}
    for key, tensor in tensors.items():
        if key in names and tensor.get_dtype() not in DTYPES:
            raise ValueError(without_scales(directory, key, tensor.get_dtype()))


def _refuse_tied(meta: MetaModel) -> None:
    """Raise ValueError if layers share the tensors of their experts."""
    for layer in meta.layers:
        for path in expert_parameters(layer):
            if f"{layer.name}.{path}" in meta.model.all_tied_weights_keys:  # type: ignore[operator]
                raise ValueError(
                    f"{type(meta.model).__name__} shares the experts of {layer.name} with another "
                    "layer: load it whole, and pass the model instead of its directory"
                )
