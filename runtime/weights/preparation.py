"""The preparation of a model: each expert rewritten as one contiguous, page-aligned block."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file

from routing.inspect_model import topology_of
from routing.layers import MoELayer
from routing.pretrained import CONFIG
from routing.process.output_lock import OutputLock
from runtime.weights.arena import expert_bytes
from runtime.weights.checkpoint_store import CheckpointStore
from runtime.weights.directory import MetaModel
from runtime.weights.mapping import CheckpointMapping
from runtime.weights.prepared_store import (
    BLOCKS,
    MANIFEST,
    RESIDENT,
    SCHEMA,
    LayerBlocks,
    checksum,
    file_checksum,
    is_prepared,
    stride,
)
from runtime.weights.quantised.coded_files import CodedFiles
from runtime.weights.repository.hub import HubOptions, fetch_weights, find_directory

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
INDEX_SUFFIX = ".index.json"


def write_prepared(
    model: str | Path,
    out: str | Path,
    hub: HubOptions = HubOptions(),  # noqa: B008 - immutable
) -> Path:
    """Write a prepared copy of `model` (a directory or a Hub id) to `out`, and return `out`.

    Until it is complete, the copy lies in `<out>.partial`. Raises ValueError for a model that
    cannot be loaded or is prepared already, and if `out` exists or another process writes it.
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
        _write(meta, directory, target)
    return target


def _write(meta: MetaModel, directory: Path, target: Path) -> None:
    files = CodedFiles(directory, quantization=meta.quantization)
    mapping = CheckpointMapping(files, meta.model)
    store = CheckpointStore(files, mapping, meta.layers, meta.layers, None)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _copy_small_files(directory, partial)
    _write_resident(files, store, partial)
    _write_experts(meta.layers, store, partial)
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


def _write_experts(layers: list[MoELayer], store: CheckpointStore, out: Path) -> None:
    """Write the blocks of all layers, then their manifest."""
    from rich.progress import track

    with (out / BLOCKS).open("wb") as file:
        blocks = [
            _write_layer(file, layers[index], index, store)
            for index in track(range(len(layers)), description="experts")
        ]
        file.flush()
        os.fsync(file.fileno())
    files = {name: file_checksum(out / name) for name in (RESIDENT, CONFIG)}
    manifest = {"schema": SCHEMA, "layers": [layer._asdict() for layer in blocks], "files": files}
    (out / MANIFEST).write_text(json.dumps(manifest) + "\n")


def _write_layer(
    file: BinaryIO, layer: MoELayer, index: int, store: CheckpointStore
) -> LayerBlocks:
    """Append the blocks of one layer to `file`, each padded to a whole page."""
    specs, start, checksums = store.specs(index), file.tell(), []
    block = torch.zeros(stride(specs), dtype=torch.uint8)
    used = block[: expert_bytes(specs)]
    pieces = used.split([spec.num_bytes for spec in specs.values()])
    into = {
        name: piece.view(spec.dtype).view(spec.shape)
        for piece, (name, spec) in zip(pieces, specs.items(), strict=True)
    }
    for expert in range(layer.num_experts):
        store.read(index, expert, into)
        file.write(block.numpy().data)
        checksums.append(checksum(used))
    parameters = {
        name: (str(spec.dtype).removeprefix("torch."), list(spec.shape))
        for name, spec in specs.items()
    }
    return LayerBlocks(layer.name, start, parameters, checksums)
