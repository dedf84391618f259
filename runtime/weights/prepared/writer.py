"""The preparation of a model: each expert rewritten as one contiguous, page-aligned block."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file

from routing.inspect_model import topology_of
from routing.layers import MoELayer
from routing.pretrained import CONFIG
from routing.process.cores import available_cores
from routing.process.output_lock import OutputLock
from runtime.weights.checkpoint_store import CheckpointStore
from runtime.weights.directory import MetaModel
from runtime.weights.mapping import CheckpointMapping
from runtime.weights.prepared.blocks_file import write_blocks
from runtime.weights.prepared.checksums import file_checksum
from runtime.weights.prepared.manifest import (
    BLOCKS,
    RESIDENT,
    Manifest,
    is_prepared,
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

    def write(self, experts: ExpertStore, *, is_lossy: bool = False, packed: bool = False) -> None:
        """Write everything, each expert as `experts` stores it.

        is_lossy: they are not the checkpoint's any more. packed: bfloat16 weights in 12 bits.
        Raises ValueError, naming the layer, for experts that cannot be packed.
        """
        threads = available_cores() if experts is self.store else 1  # an encoder has its own
        _copy_small_files(self.directory, self.out)
        _write_resident(self.files, self.store, self.out)
        blocks = write_blocks(self.out / BLOCKS, self.layers, experts, threads, packed=packed)
        manifest = Manifest(blocks, is_lossy)
        checksums = {name: file_checksum(self.out / name) for name in (RESIDENT, CONFIG)}
        write_manifest(self.out, manifest, checksums)


def write_prepared(
    model: str | Path,
    out: str | Path,
    hub: HubOptions = HubOptions(),  # noqa: B008 - immutable
    *,
    packed: bool = False,
) -> Path:
    """Write a prepared copy of `model` (a directory or a Hub id) to `out`, and return `out`.

    packed: bfloat16 experts in 12 bits a weight, lossless. Raises ValueError as `preparation` does,
    and for experts that cannot be packed.
    """
    with preparation(model, out, hub) as started:
        started.write(started.store, packed=packed)
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
