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
    if not isinstance(items, list) or any(type(item) is not int for item in items):
        raise ValueError(f"{where}: token ids are no list of integers, but {value!r:.60}")
    return items


def decode_base64(text: str, where: str) -> bytes:
    """The bytes of base64 text. Raises ValueError where it is cut or damaged."""
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
    try:
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{where}: routed_experts is a cut .npy file ({error})") from error
    return array


def _raw(value: dict[str, Any], where: str) -> np.ndarray:
    try:
        data, shape, dtype = value["data"], value["shape"], np.dtype(value.get("dtype", "int32"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: routed_experts lacks data, shape or dtype ({error})") from error
    return from_bytes(decode_base64(data, where), dtype, shape, where)


def from_bytes(data: bytes, dtype: np.dtype[Any], shape: Any, where: str) -> np.ndarray:
    """Numbers of `dtype` in `shape`. Raises ValueError where the bytes do not make it up."""
    try:
        return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: routed_experts is cut: {len(data)} bytes are no {dtype} {shape}"
        ) from error
