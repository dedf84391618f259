"""Folders of files: which of them are documents, and in which layout of data sets they lie."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from trace.sources.row_files import BINARY, READERS
from trace.sources.text_files import DECOMPRESSORS, kind_of

TEXT_KINDS = (".txt", ".md")
KINDS = (*TEXT_KINDS, *READERS)
ABOUT = "README.md"
"""Describes a data set, and is none of its documents."""
ABOUT_KINDS = (".md", ".json")
"""Beside folders of splits, files of these kinds are about them."""
SPLIT = re.compile(r"(train|training|test|testing|validation|valid|val|dev|eval)(?![a-z])", re.I)
SHARD = re.compile(rf"{SPLIT.pattern}-\d+-of-\d+\.", re.I)

Layout = Literal["files", "saved", "hub"]


def is_known(path: Path) -> bool:
    """Whether the suffix is that of a file of documents."""
    kind = kind_of(path)
    return kind in KINDS and not (kind in BINARY and path.suffix.lower() in DECOMPRESSORS)


def layout_of(folder: Path) -> Layout:
    """The layout of a folder: loose files, `datasets.save_to_disk`, or that of the Hub.

    The Hub's has a README.md with `configs`, a folder for each split, or files that are named after
    their split (in `data/`, or `train-00000-of-00001.parquet`). Raises ValueError for files of no
    split beside the folders of splits: they would be left out in silence.
    """
    if (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    ):
        return "saved"
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    data = folder / "data"
    if _has_configs(folder / ABOUT):
        return "hub"
    splits = [path.name for path in inside if path.is_dir() and SPLIT.fullmatch(path.name)]
    loose = [path for path in inside if _is_of_no_split(path)]
    if splits and loose:
        raise ValueError(
            f"{folder} has files of no split ({loose[0].name}) beside folders of splits "
            f"({', '.join(splits)}): name the files, {folder}/*{loose[0].suffix}, or a folder"
        )
    if (
        splits
        or any(SHARD.match(path.name) for path in inside)
        or (data.is_dir() and any(SPLIT.match(p.name) and is_known(p) for p in data.iterdir()))
    ):
        return "hub"
    return "files"


def _is_of_no_split(path: Path) -> bool:
    """Whether it is a file of documents whose name does not begin with that of a split."""
    is_document = is_known(path) and kind_of(path) not in ABOUT_KINDS and path.is_file()
    return is_document and not SPLIT.match(path.name)


def _has_configs(about: Path) -> bool:
    """Whether the front matter of a README.md lists configurations of a data set."""
    if not about.is_file():
        return False
    text = about.read_text(encoding="utf-8-sig", errors="replace")
    front = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.S)
    return front is not None and re.search(r"^configs:", front[1], re.M) is not None


def files_of(folder: Path) -> list[tuple[Path, str]]:
    """The files of a folder and of those in it, sorted by path, each with its label.

    The label is the path within the folder, without suffixes. One printed line says what was
    skipped. Raises ValueError for a folder without any file of a known kind.
    """
    found: list[tuple[Path, str]] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    for path in _walk(folder, seen, skipped):
        reason = _reason_to_skip(path, seen)
        if reason:
            skipped[reason] += 1
        else:
            found.append((path, label_of(path.relative_to(folder))))
    if skipped:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        print(f"{folder}: read {len(found)} files; skipped {listed}")
    if not found:
        raise ValueError(f"the folder {folder} has no {', '.join(KINDS)} files")
    return sorted(found)


def _walk(folder: Path, seen: set[tuple[int, int]], skipped: Counter[str]) -> Iterator[Path]:
    """All paths under a folder that are no folders. A folder is entered once: links may loop."""
    try:
        if not _is_new(folder, seen):
            skipped["links to folders already read"] += 1
            return
        inside = sorted(folder.iterdir())
    except PermissionError as error:
        raise ValueError(f"the folder {folder} cannot be read ({error.strerror})") from error
    for path in inside:
        if path.is_dir() and not path.name.startswith("."):
            yield from _walk(path, seen, skipped)
        else:
            yield path


def _is_new(path: Path, seen: set[tuple[int, int]]) -> bool:
    status = os.stat(path)
    key = status.st_dev, status.st_ino
    is_new = key not in seen
    seen.add(key)
    return is_new


def _reason_to_skip(path: Path, seen: set[tuple[int, int]]) -> str | None:
    """Words for the list of skipped files; None for a file of documents."""
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "broken links or special files"
    if path.name == ABOUT:
        return ABOUT
    if not is_known(path):
        kind, suffix = kind_of(path), path.suffix.lower()
        return (kind + suffix if suffix in DECOMPRESSORS else suffix) or "without suffix"
    return None if _is_new(path, seen) else "links to files already read"


def label_of(path: Path) -> str:
    """The label of a file's documents: its path without suffixes."""
    if path.suffix.lower() in DECOMPRESSORS:
        path = path.with_suffix("")
    return path.with_suffix("").as_posix()
