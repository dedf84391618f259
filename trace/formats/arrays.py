"""JSON records of requests, and the arrays in them: lists, or base64 of raw numbers or of .npy."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NPY_MAGIC = b"\x93NUMPY"
LARGEST = 1 << 62
"""Above any id or count."""


def records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a .json file (one, or a list) or of a .jsonl file, each with its place.

    Raises ValueError, naming file and line, for anything else.
    """
    text = _text(path)
    if path.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _object(_parsed(line, where), where)
        return
    value = _parsed(text, str(path))
    if not isinstance(value, list):
        yield _object(value, str(path))
        return
    for number, entry in enumerate(value):
        yield _object(entry, f"{path}, entry {number}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error})") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


def _object(value: Any, where: str) -> tuple[dict[str, Any], str]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: no JSON object, but {value!r:.60}")
    return value, where


def token_list(value: Any, where: str) -> list[int]:
    """A list of token ids. Raises ValueError for anything else."""
    items = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(items, list) or not all(map(_is_integer, items)):
        raise ValueError(f"{where}: token ids are no list of integers, but {value!r:.60}")
    return items


def _is_integer(value: object) -> bool:
    return type(value) is int and abs(value) < LARGEST


def count(value: Any, name: str, where: str) -> int:
    """A count of tokens or the like. Raises ValueError, saying which, for anything else."""
    number = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if not _is_integer(number) or number < 0:
        raise ValueError(f"{where}: {name} is {value!r:.60}, not a count")
    return int(number)


def part(record: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The object `name` of a record, empty where there is none. Raises ValueError for another."""
    value = record.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {name} is no object, but {value!r:.60}")
    return value or {}


def load_numpy(source: Path | io.BytesIO, where: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, or that of a .npy file as `experts`. Raises ValueError."""
    try:
        found = np.load(source, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"experts": found}
        with found:
            return {name: found[name] for name in found.files}
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
        raise ValueError(
            f"{where} is no numpy file, or is cut; save a plain array of integers with numpy.save "
            "(arrays of objects are never read)"
        ) from error


def decode_base64(text: Any, where: str) -> bytes:
    """The bytes of base64 text. Raises ValueError where it is cut or damaged."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: routed_experts is no base64 text, but {text!r:.60}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: routed_experts is cut or damaged base64 ({error})") from error


def routed_array(value: Any, where: str) -> np.ndarray:
    """Routes [tokens, layers, experts] as integers.

    They are nested lists, an array, base64 of a .npy file, or `{"data", "shape", "dtype"}`. Raises
    ValueError for anything else.
    """
    array = _array(value, where)
    if array.size == 0:
        array = array.reshape(0, *array.shape[1:3]) if array.ndim >= 3 else np.zeros((0, 0, 0), int)
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: routed_experts is {array.dtype} {list(array.shape)}, not integers "
            "[tokens, layers, experts of a token]"
        )
    return array.astype(np.int64)


def _array(value: Any, where: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str):
        return _npy(decode_base64(value, where), where)
    if isinstance(value, dict):
        return _raw(value, where)
    try:
        return np.array(value, np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{where}: routed_experts is no array: its rows differ in length, or hold something "
            "else than integers"
        ) from error


def _npy(data: bytes, where: str) -> np.ndarray:
    if not data.startswith(NPY_MAGIC):
        raise ValueError(f"{where}: the base64 of routed_experts is no .npy file")
    return load_numpy(io.BytesIO(data), f"{where}: routed_experts")["experts"]


def _raw(value: dict[str, Any], where: str) -> np.ndarray:
    try:
        data, shape, dtype = value["data"], value["shape"], np.dtype(value.get("dtype", "int32"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: routed_experts lacks data, shape or dtype ({error})") from error
    return from_bytes(decode_base64(data, where), dtype, shape, where)


def from_bytes(data: bytes, dtype: np.dtype[Any], shape: Any, where: str) -> np.ndarray:
    """Numbers of `dtype` in `shape`. Raises ValueError where the bytes do not make it up."""
    try:
        return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{where}: routed_experts is cut: {len(data)} bytes are no {dtype} {shape}"
        ) from error
