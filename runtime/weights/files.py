"""The safetensors files of a checkpoint, read in pieces and watched for changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes that can be read as they are, by their names in safetensors."""


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
        if target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous():
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


class CheckpointFiles:
    """The tensors of a checkpoint directory.

    single: the file to open in a directory without an index of shards.
    Raises ValueError if the directory has no safetensors, or if a file is missing or truncated.
    Reading raises ValueError if a file was changed after it was opened.
    """

    def __init__(self, directory: Path, single: str = SINGLE) -> None:
        self.directory = directory
        self._single = single
        self._files: dict[str, tuple[WatchedFile, Any]] = {}
        self.entries = self._read_entries()

    def _read_entries(self) -> dict[str, Entry]:
        path = self.directory / INDEX
        if not path.is_file():
            if not (self.directory / self._single).is_file():
                raise ValueError(
                    f"{self.directory} has no {self._single} or {INDEX}: only safetensors are read"
                )
            return self._open(self._single)
        try:
            index = dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not an index of weights ({error!r})") from error
        headers = {file: self._open(file) for file in dict.fromkeys(index.values())}
        for key, file in index.items():
            if key not in headers[file]:
                raise ValueError(f"{path} names {key} in {file}, but it is not there")
        return {key: headers[file][key] for key, file in index.items()}

    def _open(self, file: str) -> dict[str, Entry]:
        """Map `file` and read its header, which safetensors compares with the size of the file."""
        path = self.directory / file
        try:
            watched, mapped = WatchedFile(path), safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}{_cut(path)}); fetch it again"
            ) from error
        self._files[file] = watched, mapped
        return read_header(path)

    def get(self, key: str) -> Tensor:
        """The tensor `key`, as pages of the mapped file."""
        tensor: Tensor = self._file_of(key).get_tensor(key)
        return tensor

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor `key`, as pages of the mapped file."""
        tensor: Tensor = self._file_of(key).get_slice(key)[start:stop]
        return tensor

    def read(self, key: str, start: int, target: Tensor) -> None:
        """Fill `target` with elements of the tensor `key`, beginning at element `start`."""
        entry = self.entries[key]
        dtype = DTYPES[entry.dtype]
        watched, _ = self._files[entry.file]
        watched.read(entry.start + start * dtype.itemsize, target, dtype)

    def _file_of(self, key: str) -> Any:
        watched, mapped = self._files[self.entries[key].file]
        watched.require_unchanged()
        return mapped


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their bytes."""
    with path.open("rb") as file:
        begin = 8 + (length := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {
        key: Entry(path.name, entry["dtype"], tuple(entry["shape"]), begin + start, begin + stop)
        for key, entry in header.items()
        for start, stop in [entry["data_offsets"]]
    }
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _cut(path: Path) -> str:
    """The first tensor that a truncated file cuts off, worded for an error message."""
    try:
        size = path.stat().st_size
        return next(f"; cut in {k}" for k, e in read_header(path).items() if e.stop > size)
    except (OSError, ValueError, KeyError, TypeError, StopIteration, MemoryError, OverflowError):
        return ""
