"""Rewrite a model's experts into one file of contiguous, page-aligned blocks.

python -m runtime.prepare MODEL OUT            write OUT, which runtime.load takes as a model
python -m runtime.prepare OUT --verify         compare a prepared model with its checksums
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from routing.cli import run

if TYPE_CHECKING:
    from routing.layers import MoELayer
    from runtime.weights.checkpoint_store import CheckpointStore
    from runtime.weights.files import CheckpointFiles
    from runtime.weights.prepared_store import LayerBlocks

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Rewrite a model's experts so that each is one contiguous block, or check such a model."""

    model: str
    """Model: a directory or an id on the Hub. With --verify, a prepared directory."""
    out: str | None = None
    """Directory to write; it must not exist."""
    verify: bool = False
    """Read all blocks of a prepared model and compare their checksums."""


def prepare(model: str | Path, out: str | Path) -> Path:
    """Write a prepared copy of `model` to `out`, all of it or nothing; returns `out`.

    The copy is in the number format of the checkpoint. Only `runtime.load` can read it: it has no
    weights under the names that transformers looks for. Raises ValueError for a model that
    `runtime.load` would refuse, and where `out` exists.
    """
    from runtime.weights.checkpoint_store import CheckpointStore
    from runtime.weights.files import CheckpointFiles
    from runtime.weights.mapping import Mapping
    from runtime.weights.prepared_store import is_prepared
    from runtime.weights.source import Stock, find_directory

    directory, target = find_directory(model), Path(out)
    if target.exists():
        raise ValueError(f"{target} exists already")
    if is_prepared(directory):
        raise ValueError(f"{directory} is a prepared model already")
    stock = Stock.of(directory)
    files = CheckpointFiles(directory)
    mapping = Mapping(files, stock.model)
    store = CheckpointStore(files, mapping, stock.layers, stock.layers, None)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _copy_small_files(directory, partial)
    _write_resident(files, store, partial)
    _write_experts(stock.layers, store, partial)
    partial.rename(target)
    return target


def _copy_small_files(directory: Path, out: Path) -> None:
    """Configuration, tokenizer, licence: whatever is no weights."""
    for path in directory.iterdir():
        is_weights = path.suffix in WEIGHTS or path.name.endswith(INDEX_SUFFIX)
        if path.is_file() and not path.name.startswith(".") and not is_weights:
            shutil.copyfile(path, out / path.name)


def _write_resident(files: CheckpointFiles, store: CheckpointStore, out: Path) -> None:
    from safetensors.torch import save_file

    from runtime.weights.prepared_store import RESIDENT

    experts = store.keys
    others = {key: files.get(key).clone() for key in files.entries if key not in experts}
    save_file(others, out / RESIDENT, {"format": "pt"})


def _write_experts(layers: list[MoELayer], store: CheckpointStore, out: Path) -> None:
    from rich.progress import track

    from runtime.weights.prepared_store import BLOCKS, MANIFEST, SCHEMA

    with (out / BLOCKS).open("wb") as file:
        blocks = [
            _write_layer(file, layers[index], index, store)
            for index in track(range(len(layers)), description="experts")
        ]
        file.flush()
        os.fsync(file.fileno())
    manifest = {"schema": SCHEMA, "layers": [layer._asdict() for layer in blocks]}
    (out / MANIFEST).write_text(json.dumps(manifest) + "\n")


def _write_layer(
    file: BinaryIO, layer: MoELayer, index: int, store: CheckpointStore
) -> LayerBlocks:
    """Append the blocks of one layer, each padded to the next page."""
    import torch

    from runtime.weights.arena import expert_bytes
    from runtime.weights.prepared_store import LayerBlocks, checksum, stride

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


def main(settings: PrepareSettings) -> None:
    """Prepare, or verify."""
    if settings.verify:
        from runtime.weights.prepared_store import verify

        print(f"{settings.model}: {verify(Path(settings.model)):,} experts are intact")
    elif settings.out is None:
        raise ValueError("say where to write the prepared model: runtime.prepare MODEL OUT")
    else:
        print(f"{prepare(settings.model, settings.out)} is ready for runtime.load")


if __name__ == "__main__":
    run(main, PrepareSettings, prog="python -m runtime.prepare", positional=["model", "out"])
