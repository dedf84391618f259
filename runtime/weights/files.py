"""The safetensors files of a checkpoint, read in pieces and watched for changes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from runtime.weights.repository.refusals import without_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes of weights that can be read as they are, by their names in safetensors."""

OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.uint8,
}
"""The dtypes of all else; of F4 there are two numbers in a byte, and shapes count the bytes."""

LONGEST_HEADER = 100_000_000
"""Bytes, as safetensors itself allows."""


class Entry(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    stop: int
    """Offset after its last byte."""


class WatchedFile:
    """An open file that notices when somebody writes into it.

    A file that is replaced or deleted stays as it was for a process that holds it open. A file that
    is rewritten in place changes under it. If a mapped file shrinks, reading it kills the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: BinaryIO = path.open("rb")
        self._state = self._stat()

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self.handle.fileno())
        return stat.st_size, stat.st_mtime_ns

    @property
    def num_bytes(self) -> int:
        """Size of the file when it was opened."""
        return self._state[0]

    def require_unchanged(self) -> None:
        """Raise ValueError if the file was written to since it was opened."""
        if self._stat() != self._state:
            raise ValueError(
                f"{self.path} was changed while the model was running out of it; load it again"
            )

    def read(self, start: int, target: Tensor, dtype: torch.dtype) -> None:
        """Fill `target` with the elements of `dtype` that begin at byte `start`.

        The bytes go straight into the memory of `target` where that is possible. They are never
        read through a mapping, which costs a page fault for every few pages and kills the process
        if the file is truncated.
        """
        self.require_unchanged()
        if is_raw(target, dtype):
            self._fill(start, target)
        else:
            stored = torch.empty(target.shape, dtype=dtype)
            self._fill(start, stored)
            target.copy_(stored)

    def _fill(self, start: int, target: Tensor) -> None:
        rest = target.detach().reshape(-1).view(torch.uint8).numpy().data
        while rest:
            count = os.preadv(self.handle.fileno(), [rest], start)
            if count == 0:
                raise ValueError(f"{self.path} ends at byte {start}; fetch it again")
            rest, start = rest[count:], start + count


def is_raw(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes of elements of `dtype` may be put straight into the memory of `target`."""
    return target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()


class CheckpointFiles:
    """The tensors of a checkpoint directory, read in pieces and never mapped.

    A mapping of a file that is larger than the memory is refused where memory is not overcommitted.

    single: the file to open in a directory without an index of shards.
    Raises ValueError if the directory has no safetensors, or if a file is missing or truncated.
    Reading raises ValueError if a file was changed after it was opened.
    """

    def __init__(self, directory: Path, single: str = SINGLE) -> None:
        self.directory = directory
        self._single = single
        self._files: dict[str, WatchedFile] = {}
        self.entries = self._read_entries()

    @classmethod
    def unread(cls, directory: Path, entries: dict[str, Entry]) -> CheckpointFiles:
        """Tensors of files that are elsewhere: their shapes alone are known."""
        files = cls.__new__(cls)
        files.directory, files.entries, files._files = directory, entries, {}
        return files

    def _read_entries(self) -> dict[str, Entry]:
        path = self.directory / INDEX
        if not path.is_file():
            if not (self.directory / self._single).is_file():
                wanted = f"{self._single} or {INDEX}"
                raise ValueError(without_weights(self.directory, wanted))
            return self._open(self._single)
        index = read_index(path)
        if self._single not in index.values() and (self.directory / self._single).is_file():
            raise ValueError(
                f"{self.directory} has two sets of weights: {self._single}, and the shards of "
                f"{INDEX}; remove the one that is not the model"
            )
        headers = {file: self._open(file) for file in dict.fromkeys(index.values())}
        for key, file in index.items():
            if key not in headers[file]:
                raise ValueError(f"{path} names {key} in {file}, but it is not there")
        entries: dict[str, Entry] = {}
        for file, header in headers.items():  # transformers reads all tensors of these files
            for key, entry in header.items():
                if key in entries:
                    raise ValueError(
                        f"{self.directory} has {key} twice: in {entries[key].file} and in {file}"
                    )
                entries[key] = entry
        return entries

    def _open(self, file: str) -> dict[str, Entry]:
        """Open `file` and read its header, which is compared with the size of the file."""
        path = self.directory / file
        try:
            self._files[file] = WatchedFile(path)
            entries = read_header(path)
            require_whole(entries, path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error!s:.200}); fetch it again"
            ) from error
        return entries

    def get(self, key: str) -> Tensor:
        """The tensor `key`."""
        return self._part(key, 0, self.entries[key].shape)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `key`."""
        shape = self.entries[key].shape
        row = torch.Size(shape[1:]).numel()
        return self._part(key, start * row, (stop - start, *shape[1:]))

    def _part(self, key: str, start: int, shape: tuple[int, ...]) -> Tensor:
        stored = self.entries[key].dtype
        dtype = (DTYPES | OTHERS).get(stored)
        if dtype is None:
            raise ValueError(f"{self.directory}: {key} is stored as {stored}: not supported")
        tensor = torch.empty(shape, dtype=dtype)
        self.read(key, start, tensor)
        return tensor

    def read(self, key: str, start: int, target: Tensor) -> None:
        """Fill `target` with elements of the tensor `key`, beginning at element `start`."""
        entry = self.entries[key]
        dtype = (DTYPES | OTHERS)[entry.dtype]
        self._files[entry.file].read(entry.start + start * dtype.itemsize, target, dtype)


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Raises ValueError, naming the file, for what is no index."""
    try:
        index = dict(json.loads(path.read_text(), object_pairs_hook=_distinct)["weight_map"])
        if not index or not all(isinstance(file, str) for file in index.values()):
            raise ValueError("no file for a tensor")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of weights ({error!r})") from error
    for file in index.values():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{path} names {file}, which lies outside of the directory")
    return index


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises ValueError, KeyError or TypeError for a header that is none.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError("it is a pointer of Git LFS instead of the file: git lfs pull")
        begin = 8 + (length := int.from_bytes(start, "little"))
        if len(start) < 8 or length > LONGEST_HEADER:
            raise ValueError("it does not begin with the header of a safetensors file")
        header = dict(json.loads(file.read(length), object_pairs_hook=_distinct))
    header.pop("__metadata__", None)
    entries = {
        key: Entry(path.name, entry["dtype"], shape, begin + start, begin + stop)
        for key, entry in header.items()
        for start, stop in [entry["data_offsets"]]
        for shape in [stored_shape(entry["dtype"], entry["shape"])]
    }
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def stored_shape(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor in elements of its dtype in torch, by its header."""
    if dtype == "F4" and shape:
        return (*shape[:-1], shape[-1] // 2)
    return tuple(shape)


def require_whole(entries: dict[str, Entry], path: Path) -> None:
    """Raise ValueError unless the tensors of a file lie in it, each with the bytes of its shape."""
    size, last = path.stat().st_size, None
    for key, entry in entries.items():
        if entry.stop > size:
            raise ValueError(f"it has {size:,} bytes; cut in {key}")
        dtype = (DTYPES | OTHERS).get(entry.dtype)
        needed = None if dtype is None else torch.Size(entry.shape).numel() * dtype.itemsize
        if needed is not None and entry.stop - entry.start != needed:
            raise ValueError(f"{key} has {entry.stop - entry.start:,} bytes instead of {needed:,}")
        if last is not None and entry.start < last:
            raise ValueError(f"{key} overlaps the tensor before it")
        last = entry.stop


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a name that it has twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is in it twice")
    return found
