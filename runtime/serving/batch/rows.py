"""Rows of a data set: objects of JSON, lines of a table or of text, data sets of the Hub."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from runtime.serving.batch.files import COMPRESSIONS, decoded, lines_of, opened

Data = dict[str, Any] | ValueError
"""The fields of a row, or what is wrong with it."""


class Row(NamedTuple):
    """One row of a data set."""

    place: str
    """`line 7`, where the file has lines, else `row 7`."""
    data: Data


def json_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    """One object a line. A line that is none becomes the ValueError that says so."""
    for at, (number, line) in enumerate(lines_of(file, name)):
        if at == 0 and (line.startswith((b"[{", b"[ {")) or line.strip() == b"["):
            raise ValueError(
                f"{name} is one JSON list, not an object a line: name it .json, or give "
                "--format json"
            )
        yield Row(f"line {number}", _parsed(line))


def _parsed(line: bytes) -> Data:
    try:
        row = json.loads(decoded(line), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        return ValueError(f"the line is not JSON: {error}")
    except (ValueError, RecursionError) as error:
        return ValueError(f"the line cannot be read: {error}")
    return row if isinstance(row, dict) else ValueError("the line is not a JSON object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises ValueError for a key that comes twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} comes twice")
    return row


def json_document(file: BinaryIO, name: str) -> Iterator[Row]:
    """A list of objects, or an object a line."""
    text = io.TextIOWrapper(file, "utf-8-sig")
    try:
        whole = text.read()
        value = json.loads(whole, object_pairs_hook=_unique) if whole.strip() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        if whole.lstrip().startswith("{"):
            yield from json_lines(io.BytesIO(whole.encode()), name)
            return
        raise ValueError(f"{name} is not JSON: {error}") from error
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        data = row if isinstance(row, dict) else ValueError("the entry is not a JSON object")
        yield Row(f"row {number}", data)


def text_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    """A prompt a line; blank lines are none."""
    for number, line in lines_of(file, name):
        try:
            yield Row(f"line {number}", {"prompt": decoded(line)})
        except ValueError as error:
            yield Row(f"line {number}", error)


def table(file: BinaryIO, name: str, delimiter: str) -> Iterator[Row]:
    """Cells under a header; an empty cell is none, and numbers and lists are as JSON writes them.

    Text needs no quotation marks beside those of the table.
    """
    csv.field_size_limit(sys.maxsize)
    lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"the header of {name} names a column twice: {', '.join(header)}")
        for cells in reader:
            if cells:
                yield Row(f"line {reader.line_num}", _cells(header, cells))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8, after line {reader.line_num}: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}") from error


def _cells(header: list[str], cells: list[str]) -> Data:
    if len(cells) != len(header):
        return ValueError(f"the line has {len(cells)} cells, but the header {len(header)}")
    pairs = zip(header, cells, strict=True)
    return {name: _value(name, cell) for name, cell in pairs if cell}


def _value(name: str, cell: str) -> Any:
    if name in ("prompt", "id", "custom_id", "label") or (name == "stop" and cell[0] != "["):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


KINDS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    "jsonl": json_lines,
    "ndjson": json_lines,
    "json": json_document,
    "csv": lambda file, name: table(file, name, ","),
    "tsv": lambda file, name: table(file, name, "\t"),
    "txt": text_lines,
}
"""Readers of files, by their suffix."""

PARQUET = "parquet"
FORMATS = (*KINDS, PARQUET)


def format_of(path: Path) -> str | None:
    """The format that a file's name tells, if it does."""
    name = Path(path.stem) if path.suffix in COMPRESSIONS else path
    suffix = name.suffix.removeprefix(".").lower()
    return suffix if suffix in FORMATS else None


def rows_of(dataset: str, split: str, format: str | None = None) -> Iterator[Row]:
    """Every row of a file, of a directory or of a data set on the Hub.

    Raises ValueError for what is not there or cannot be read.
    """
    path = Path(dataset)
    kind = format or format_of(path)
    if path.is_file() and kind is None:
        raise ValueError(
            f"{dataset} does not say what it is: name it one of .{', .'.join(FORMATS)}, or give "
            "--format"
        )
    if not path.exists() and (kind or path.is_absolute() or dataset.startswith((".", "~"))):
        raise ValueError(f"there is no file {dataset}")
    if path.is_dir() or kind in (None, PARQUET):
        rows = _library_rows(path, dataset, split, kind)
        yield from (Row(f"row {number}", dict(row)) for number, row in enumerate(rows, 1))
    else:
        assert kind is not None
        with opened(path) as file:
            yield from KINDS[kind](file, dataset)


def _library_rows(path: Path, dataset: str, split: str, kind: str | None) -> Iterator[Any]:
    import datasets

    try:
        if kind == PARQUET and path.is_file():
            files = {"data_files": str(path), "split": "train", "streaming": True}
            yield from datasets.load_dataset(PARQUET, **files)
        elif (path / "dataset_dict.json").exists():
            yield from datasets.load_from_disk(dataset)[split]
        elif (path / "state.json").exists():
            yield from datasets.load_from_disk(dataset)
        else:
            yield from datasets.load_dataset(dataset, split=split, streaming=path.is_dir())
    except Exception as error:  # the hub client raises many kinds, none of them ours to tell apart
        raise ValueError(
            f"{dataset} cannot be read ({' '.join(str(error).split()):.200})"
        ) from error
