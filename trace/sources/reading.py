"""Documents of all data sets of a trace, in order, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trace.settings import SPLIT, CollectSettings
from trace.sources import library
from trace.sources.chats import Turn, content_of, is_blank, require
from trace.sources.documents import Tally, Text
from trace.sources.folders import KINDS, TEXT_KINDS, files_of, is_known, label_of, layout_of
from trace.sources.row_files import READERS, Row
from trace.sources.text_files import kind_of, split_text


def read_texts(settings: CollectSettings, tally: Tally | None = None) -> Iterator[Text]:
    """The documents of all data sets, in order; blank ones are left out, and counted.

    Raises ValueError or OSError for a data set that is missing, damaged, or holds something else.
    """
    for name in settings.dataset:
        for source, texts in _sources(name, settings):
            try:
                for text in texts:
                    if not is_blank(text.content):
                        yield text
                    elif tally is not None:
                        tally.num_empty += 1
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error


def _sources(name: str, settings: CollectSettings) -> Iterator[tuple[str, Iterator[Text]]]:
    """The parts of one entry of --dataset: a name for messages, and its documents."""
    path = Path(name)
    is_files = path.is_file() or (path.is_dir() and layout_of(path) == "files")
    if is_files and settings.split != SPLIT:
        raise ValueError(f"{name} has no splits: leave --split {settings.split} out")
    if path.is_dir() and is_files:
        for file, label in files_of(path):
            yield str(file), _file(file, label, settings)
    elif is_files:
        yield name, _file(path, label_of(Path(path.name)), settings)
    else:
        yield name, _rows(_library(name, settings), name, settings)


def _file(path: Path, label: str, settings: CollectSettings) -> Iterator[Text]:
    if not is_known(path):
        raise ValueError(f"it is not one of the known kinds: {', '.join(KINDS)}")
    kind = kind_of(path)
    if kind not in TEXT_KINDS:
        yield from _rows(READERS[kind](path), label, settings)
        return
    if settings.chat_template:
        raise ValueError("it is plain text, but --chat_template needs rows with turns of a chat")
    for text in split_text(path):
        yield Text(text, label)


def _library(name: str, settings: CollectSettings) -> Iterator[Row]:
    """Rows that the `datasets` library reads. Raises ValueError for a path that leads nowhere."""
    path, split = Path(name), settings.split
    if path.is_dir():
        print(f"{name} is laid out as a data set: reading its split {split!r} (--split)")
        if layout_of(path) == "saved":
            yield from library.saved(path, split=split)
            return
    elif is_known(path) or (name.startswith((".", "/", "~")) and ":" not in name):
        raise ValueError("there is no such file or folder")
    stem, _, config = (name, "", "") if path.is_dir() else name.partition(":")
    streaming = settings.streaming or Path(stem).is_dir()
    yield from library.of_the_hub(stem, config or None, split=split, streaming=streaming)


def _rows(rows: Iterator[Row], label: str, settings: CollectSettings) -> Iterator[Text]:
    for row in rows:
        if settings.label_column is not None:
            require(row, settings.label_column)
        name = str(row[settings.label_column]) if settings.label_column else label
        yield Text(_content(row, settings), name)


def _content(row: Row, settings: CollectSettings) -> str | list[Turn]:
    """The text or the turns of a row, as --chat_template expects them. Raises ValueError."""
    content = content_of(row, settings.column)
    if isinstance(content, str) and content and settings.chat_template:
        raise ValueError(
            f"--chat_template needs lists of messages, not {content!r:.80}: leave it out"
        )
    if not isinstance(content, str) and not settings.chat_template:
        raise ValueError(
            "its rows are chats, not text; give --chat_template true to render them with the "
            "tokenizer's template, plain to join their turns, or --column for a column of text"
        )
    return content
