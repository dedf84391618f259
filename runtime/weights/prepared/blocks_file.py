"""The file of blocks of a prepared model, written by threads, an expert each."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from routing.layers import MoELayer
from runtime.weights.packed.packed_blocks import PackedBlocks
from runtime.weights.packed.packing import PATCHES
from runtime.weights.prepared.manifest import PAGE, LayerBlocks
from runtime.weights.store import ExpertStore

MOST_THREADS = 16
"""Threads that read, pack and write: more do not make a disk faster."""


class _NoRoomError(Exception):
    """A chunk has more patches than there is room for."""


def write_blocks(
    path: Path, layers: list[MoELayer], store: ExpertStore, threads: int, *, packed: bool
) -> list[LayerBlocks]:
    """Write the blocks of all layers to `path`, and return what lies where.

    packed: with the bfloat16 weights of all experts in 12 bits, with as little room for patches as
    does for all of them. Raises ValueError, naming the layer, for experts that cannot be packed.
    """
    if not packed:
        return _write(path, layers, store, threads, 0)
    for index, layer in enumerate(layers):
        _require_packable(layer, store, index)
    for patches in PATCHES:
        try:
            return _write(path, layers, store, threads, patches)
        except _NoRoomError as error:
            why = error
    raise ValueError(
        f"the weights of {why} have too many different exponents to be packed; prepare the model "
        "without --packed"
    )


def _require_packable(layer: MoELayer, store: ExpertStore, index: int) -> None:
    if layer.kind != "fused":
        raise ValueError(
            f"{layer.name} has a module for each expert, which no kernel runs: a GPU keeps them "
            "unpacked; prepare the model without --packed"
        )
    names = ", ".join(matrix.encoding.name for matrix in store.coding(index).values())
    dtypes = ", ".join(str(spec.dtype) for spec in store.specs(index).values())
    if names or not _packed_blocks(layer, store, index, PATCHES[0]).layout.can_pack:
        raise ValueError(
            f"{layer.name} has experts of {names or dtypes}, and only bfloat16 weights in rows of "
            "eights are packed; prepare the model without --packed"
        )


def _packed_blocks(layer: MoELayer, store: ExpertStore, index: int, patches: int) -> PackedBlocks:
    turned = bool(getattr(layer.module, "is_transposed", False))
    return PackedBlocks.of(store.specs(index), patches, transposed=turned)


def _write(
    path: Path, layers: list[MoELayer], store: ExpertStore, threads: int, patches: int
) -> list[LayerBlocks]:
    from rich.progress import track

    blocks: list[LayerBlocks] = []
    with path.open("wb") as file, _pool(min(threads, MOST_THREADS)) as pool:
        start = 0
        for index in track(range(len(layers)), description="experts"):
            layer = layers[index]
            packed = _packed_blocks(layer, store, index, patches) if patches else None
            specs, coding = store.stored_specs(index), store.coding(index)
            entry = LayerBlocks.of(layer.name, start, specs, coding, packed)
            blocks.append(_write_layer(file.fileno(), entry, layer, index, store, pool))
            start = -(-blocks[-1].stop // PAGE) * PAGE
        os.ftruncate(file.fileno(), start)
        os.fsync(file.fileno())
    return blocks


def _write_layer(
    file: int, entry: LayerBlocks, layer: MoELayer, index: int, store: ExpertStore,
    pool: ThreadPoolExecutor,
) -> LayerBlocks:  # fmt: skip
    """Write the blocks of one layer, each from a page's beginning on."""
    write = partial(_write_expert, file, entry, index, store)
    checksums = list(pool.map(write, range(layer.num_experts)))
    return entry._replace(checksums=checksums)


def _write_expert(
    file: int, entry: LayerBlocks, index: int, store: ExpertStore, expert: int
) -> int:
    """Write one block. Returns its checksum."""
    block = _read_block(entry, index, store, expert)
    rest, at = block.numpy().data, entry.offset(expert)
    while rest:
        count = os.pwrite(file, rest, at)
        rest, at = rest[count:], at + count
    return zlib.crc32(block.numpy().data)


@torch.no_grad()
def _read_block(entry: LayerBlocks, index: int, store: ExpertStore, expert: int) -> Tensor:
    """One expert as it will lie in the file, uint8 [bytes]."""
    packed = entry.packed
    if packed is None:
        into = {n: torch.empty(spec.shape, dtype=spec.dtype) for n, spec in entry.specs.items()}
        store.read_stored(index, expert, into)
        return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in into.values()])
    block_N = torch.zeros(packed.layout.units, dtype=torch.int16)
    store.read(index, expert, packed.parameters(block_N))
    stored_N = packed.layout.store(block_N)
    if stored_N is None:
        raise _NoRoomError(f"{entry.name}, expert {expert},")
    return stored_N.view(torch.uint8)


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that have none of their own to compute. After an error, the rest is left undone."""
    before = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="expertflow-prepare")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
