"""Data sets that the `datasets` library reads: of the Hub, in its layout, or saved to disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def of_the_hub(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[Row]:
    """The rows of a data set of the Hub, or of a folder that is laid out like one."""
    from datasets import load_dataset

    rows: Iterable[Row] = load_dataset(name, config, split=split, streaming=streaming)
    return _with_names(rows)


def saved(folder: Path, *, split: str) -> Iterator[Row]:
    """The rows of a folder of `datasets.save_to_disk`. Raises ValueError for a missing split."""
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    if isinstance(found, DatasetDict):
        if split not in found:
            raise ValueError(f"it has no split {split!r}; its splits are {', '.join(found)}")
        found = found[split]
    return _with_names(found)


def _with_names(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, with the names of classes in place of their numbers."""
    from datasets import ClassLabel

    features = getattr(rows, "features", None) or {}
    classes = {name: kind for name, kind in features.items() if isinstance(kind, ClassLabel)}
    for row in rows:
        named = {
            name: kind.int2str(row[name])
            for name, kind in classes.items()
            if isinstance(row[name], int) and row[name] >= 0
        }
        yield row | named
