"""Files of rows: JSON, JSON lines, CSV, TSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trace.sources.text_files import open_text

Row = dict[str, Any]
BATCH_ROWS = 64
"""Rows of a Parquet file in memory at a time."""


def json_lines(path: Path) -> Iterator[Row]:
    """One object a line; blank lines do not matter."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield _object(_parsed(line, f"line {number}"), f"line {number}")


def json_document(path: Path) -> Iterator[Row]:
    """A list of objects, an object with such a list in it, one object, or JSON lines."""
    with open_text(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{") and "Extra data" in str(error):
            yield from json_lines(path)
            return
        raise ValueError(f"it is no JSON ({error})") from error
    lists = [x for x in value.values() if _are_rows(x)] if isinstance(value, dict) else []
    rows = lists[0] if len(lists) == 1 and len(value) == 1 else value
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _object(row, f"entry {number}")


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error})") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object but {json.dumps(value)!s:.80}")
    return value


def separated(path: Path, delimiter: str) -> Iterator[Row]:
    """Cells under a header line. Every cell is text: nothing is taken for a number or for none."""
    csv.field_size_limit(sys.maxsize)
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise ValueError(f"its header names a column twice: {', '.join(header)}")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ValueError(
                        f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}"
                    )
                if cells:
                    yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file; one without rows has none."""
    from pyarrow.parquet import ParquetFile

    if path.stat().st_size:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()


def arrow(path: Path) -> Iterator[Row]:
    """The rows of an Arrow file, in the stream format of `datasets` or in the file format."""
    from pyarrow import ArrowInvalid, ipc, memory_map

    if not path.stat().st_size:
        return
    with memory_map(str(path)) as source:
        try:
            batches: Any = ipc.open_stream(source)
        except ArrowInvalid:
            file = ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from batch.slice(start, BATCH_ROWS).to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_document,
    ".csv": lambda path: separated(path, ","),
    ".tsv": lambda path: separated(path, "\t"),
    ".parquet": parquet,
    ".arrow": arrow,
}
BINARY = {".parquet", ".arrow"}
"""Kinds that have a compression of their own: `.parquet.gz` is none of them."""
