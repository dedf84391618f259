"""The preparation of a model: each expert rewritten as one contiguous, page-aligned block."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors.torch import save_file

from routing.inspect_model import topology_of
from routing.layers import MoELayer
from routing.pretrained import CONFIG
from routing.process.output_lock import OutputLock
from runtime.weights.checkpoint_store import CheckpointStore
from runtime.weights.directory import MetaModel
from runtime.weights.mapping import CheckpointMapping
from runtime.weights.prepared.checksums import checksum, file_checksum
from runtime.weights.prepared.manifest import (
    BLOCKS,
    RESIDENT,
    LayerBlocks,
    Manifest,
    is_prepared,
    stride,
    write_manifest,
)
from runtime.weights.quantised.coded_files import CodedFiles
from runtime.weights.repository.hub import HubOptions, fetch_weights, find_directory
from runtime.weights.store import ExpertStore

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
INDEX_SUFFIX = ".index.json"


class Preparation(NamedTuple):
    """A checkpoint that is being rewritten."""

    directory: Path
    """Of the checkpoint."""
    out: Path
    """The directory that is written; it has another name in the end."""
    layers: list[MoELayer]
    """On the meta device."""
    files: CodedFiles
    store: CheckpointStore
    """Reads the checkpoint's experts."""

    def write(self, experts: ExpertStore, *, is_lossy: bool = False) -> None:
        """Write everything, each expert as `experts` stores it.

        is_lossy: they are not the checkpoint's any more.
        """
        _copy_small_files(self.directory, self.out)
        _write_resident(self.files, self.store, self.out)
        manifest = Manifest(_write_experts(self.layers, experts, self.out), is_lossy)
        checksums = {name: file_checksum(self.out / name) for name in (RESIDENT, CONFIG)}
        write_manifest(self.out, manifest, checksums)


def write_prepared(
    model: str | Path,
    out: str | Path,
    hub: HubOptions = HubOptions(),  # noqa: B008 - immutable
) -> Path:
    """Write a prepared copy of `model` (a directory or a Hub id) to `out`, and return `out`.

    Raises ValueError as `preparation` does.
    """
    with preparation(model, out, hub) as started:
        started.write(started.store)
    return Path(out)


@contextmanager
def preparation(model: str | Path, out: str | Path, hub: HubOptions) -> Iterator[Preparation]:
    """Prepare `model` within the context; `out` is there once it ends without an error.

    Until then, what is written lies in `<out>.partial`. Raises ValueError for a model that cannot
    be loaded or is prepared already, and if `out` exists or another process writes it.
    """
    directory, target = find_directory(model, hub), Path(out)
    if is_prepared(directory):
        raise ValueError(f"{directory} is a prepared model already")
    meta = MetaModel.of(directory)
    topology_of(meta.model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with OutputLock(target):
        if target.exists():
            raise ValueError(f"{target} exists already")
        fetch_weights(model, directory, hub)
        files = CodedFiles(directory, quantization=meta.quantization)
        mapping = CheckpointMapping(files, meta.model)
        store = CheckpointStore(files, mapping, meta.layers, meta.layers, None)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield Preparation(directory, partial, meta.layers, files, store)
        partial.rename(target)


def _copy_small_files(directory: Path, out: Path) -> None:
    """Copy the configuration, the tokenizer, an adapter: all but the model's weights."""
    for path in directory.iterdir():
        is_weights = path.suffix in WEIGHTS or path.name.endswith(INDEX_SUFFIX)
        is_weights = is_weights and not path.name.startswith("adapter_model")
        if path.is_file() and not path.name.startswith(".") and not is_weights:
            shutil.copyfile(path, out / path.name)


def _write_resident(files: CodedFiles, store: CheckpointStore, out: Path) -> None:
    """Write all weights but the experts into one safetensors file, as they are stored."""
    stored, experts = files.stored, files.stored_keys(store.keys)
    resident = {key: stored.get(key).clone() for key in stored.entries if key not in experts}
    save_file(resident, out / RESIDENT, {"format": "pt"})


def _write_experts(layers: list[MoELayer], store: ExpertStore, out: Path) -> list[LayerBlocks]:
    """Write the blocks of all layers."""
    from rich.progress import track

    with (out / BLOCKS).open("wb") as file:
        blocks = [
            _write_layer(file, layers[index], index, store)
            for index in track(range(len(layers)), description="experts")
        ]
        file.flush()
        os.fsync(file.fileno())
    return blocks


def _write_layer(file: BinaryIO, layer: MoELayer, index: int, store: ExpertStore) -> LayerBlocks:
    """Append the blocks of one layer to `file`, each padded to a whole page."""
    specs, start, checksums = store.stored_specs(index), file.tell(), []
    into = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    for expert in range(layer.num_experts):
        store.read_stored(index, expert, into)
        block = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in into.values()])
        file.write(block.numpy().data)
        file.write(bytes(stride(specs) - len(block)))
        checksums.append(checksum(block))
    return LayerBlocks.of(layer.name, start, specs, checksums, store.coding(index))
