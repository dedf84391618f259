"""Traces written as tables: a Parquet file, or a data set of the `datasets` library.

python -m trace.formats export --trace DIR --out routes.parquet

A row for each document holds `document`, `label`, `token_ids` [T], `phase` [T] and `experts`
[T][L][K] (null for no expert); a row for each token holds `document`, `position`, `label`,
`token_id`, `phase` and `experts` [L][K]. Router weights, router logits and hidden states become
columns where the trace has them. Without token ids there is no such column. The topology is in the
schema's metadata, as JSON under `expertflow.topology`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routing.cli import run
from trace.formats.settings import ExportSettings

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from routing.shards import Document, TraceReader

TOPOLOGY = b"expertflow.topology"
OTHER_FILES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".arrow", ".txt", ".npy", ".pq", ".gz"}
"""Suffixes of files that somebody may hope for, and that are no names of folders."""
ROW_TOKENS = 1 << 16
"""Tokens of a group of rows, about."""


def export_trace(settings: ExportSettings) -> None:
    """Write the table.

    Raises ValueError for a trace without documents, an `out` that exists, or one named like a file
    of another kind.
    """
    from routing.shards import TraceReader

    reader = TraceReader(settings.trace, settings.stack)
    if not len(reader):
        raise ValueError(f"the trace {settings.trace} holds no documents")
    if settings.out.exists():
        raise ValueError(f"{settings.out} exists: name another --out, or delete it")
    if settings.out.suffix in OTHER_FILES:
        raise ValueError(
            f"--out {settings.out}: no {settings.out.suffix} file is written; name a .parquet "
            "file, or a folder for a data set"
        )
    if settings.out.suffix == ".parquet":
        write_parquet(reader, settings.out, rows=settings.rows)
    else:
        to_dataset(reader, rows=settings.rows).save_to_disk(settings.out)
    print(f"wrote {len(reader):,} documents, {reader.num_tokens:,} tokens: {settings.out}")


def write_parquet(reader: TraceReader, path: Path, *, rows: str = "documents") -> None:
    """Write a Parquet file; it appears whole or not at all."""
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.tmp")
    tables = tables_of(reader, rows)
    first = next(tables)
    try:
        with pq.ParquetWriter(temporary, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def to_dataset(reader: TraceReader, *, rows: str = "documents") -> datasets.Dataset:
    """The trace as a `datasets.Dataset`."""
    import datasets
    import pyarrow as pa

    return datasets.Dataset(pa.concat_tables(tables_of(reader, rows)))


def tables_of(reader: TraceReader, rows: str = "documents") -> Iterator[pa.Table]:
    """Tables of whole documents, all of one schema; at least one where there is a document."""
    group: list[tuple[int, Document]] = []
    tokens = 0
    for number, document in enumerate(reader.documents()):
        group.append((number, document))
        tokens += len(document.token_ids_T)
        if tokens >= ROW_TOKENS:
            yield _table(reader, group, rows)
            group, tokens = [], 0
    if group:
        yield _table(reader, group, rows)


def _table(reader: TraceReader, group: list[tuple[int, Document]], rows: str) -> pa.Table:
    import pyarrow as pa

    lengths = [len(document.token_ids_T) for _, document in group]
    columns = {} if rows == "documents" else _positions(group, lengths)
    for name, parts in _values([document for _, document in group], reader).items():
        nothing = reader.stack.num_experts if name == "experts" else None
        per_token = _nested(np.concatenate(parts), nothing)
        columns[name] = per_token if rows == "tokens" else _lists(per_token, lengths)
    if rows == "documents":
        numbers = pa.array([number for number, _ in group], pa.int64())
        labels = pa.array([document.label for _, document in group], pa.string())
        columns = {"document": numbers, "label": labels, **columns}
    elif "token_ids" in columns:
        columns = {{"token_ids": "token_id"}.get(name, name): c for name, c in columns.items()}
    topology = json.dumps(reader.topology.to_json()).encode()
    return pa.table(columns).replace_schema_metadata({TOPOLOGY: topology})


def _positions(group: list[tuple[int, Document]], lengths: list[int]) -> dict[str, Any]:
    import pyarrow as pa

    labels = pa.array([document.label for _, document in group], pa.string())
    return {
        "document": pa.array(np.repeat([number for number, _ in group], lengths), pa.int64()),
        "position": pa.array(np.concatenate([np.arange(n) for n in lengths]), pa.int32()),
        "label": labels.take(pa.array(np.repeat(np.arange(len(group)), lengths))),
    }


def _values(documents: list[Document], reader: TraceReader) -> dict[str, list[Any]]:
    """The values of each column, [tokens, ...] for each document."""
    found: dict[str, list[Any]] = {}
    for document in documents:
        values: dict[str, np.ndarray] = {"phase": document.phase_T}
        if reader.extras.token_ids:
            values = {"token_ids": document.token_ids_T, **values}
        values["experts"] = document.experts_TLK
        if document.weights_TLK is not None:
            values["weights"] = document.weights_TLK
        if document.router is not None:
            values["router_experts"] = document.router.experts_TLM
            values["router_logits"] = document.router.logits_TLM
        values |= {f"hidden_{layer}": hidden for layer, hidden in document.hidden.items()}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def _nested(values: np.ndarray, nothing: int | None) -> pa.Array:
    """An arrow array of one entry for each token; float16 as float32, which more readers know.

    nothing: values from this on are null.
    """
    import pyarrow as pa

    flat = values.reshape(-1)
    if values.dtype == np.float16:
        flat = flat.astype(np.float32)
    array = pa.array(flat, mask=None if nothing is None else flat >= nothing)
    for size in reversed(values.shape[1:]):
        array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array


def _lists(per_token: pa.Array, lengths: list[int]) -> pa.Array:
    import pyarrow as pa

    return pa.ListArray.from_arrays(np.cumsum([0, *lengths]).astype(np.int32), per_token)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. The trace comes first, without `--trace`."""
    run(
        export_trace,
        ExportSettings,
        argv,
        prog="python -m trace.formats export",
        positional=["trace"],
        examples=["trace --out routes.parquet", "trace --out routes --rows tokens"],
    )


if __name__ == "__main__":
    main()
