"""Labelled documents of Hugging Face data sets and local files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trace.settings import CollectSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"
BUILDERS = {".jsonl": "json", ".parquet": "parquet"}
SUFFIXES = (".txt", *BUILDERS)


class Text(NamedTuple):
    """A document as its source has it."""

    content: Any
    """A string, or the messages of a chat."""
    label: str


class Prompt(NamedTuple):
    """A document as the model reads it."""

    number: int
    """Its place in the trace."""
    ids: list[int]
    label: str
    num_cut: int
    """Tokens left out at the end, because the document is longer than allowed."""


def read_texts(settings: CollectSettings) -> Iterator[Text]:
    """The documents of all data sets, in order; blank ones are left out.

    Raises ValueError or OSError for a data set that is missing, damaged or lacks the column.
    """
    for name in settings.dataset:
        for source in _expand(name):
            try:
                yield from (text for text in _read(source, settings) if _not_blank(text.content))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error


def _expand(name: str) -> list[str]:
    """The files of a folder in alphabetical order; any other name as it is."""
    path = Path(name)
    if not path.is_dir():
        return [name]
    files = sorted(str(file) for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"the folder {name} has no {', '.join(SUFFIXES)} files")
    return files


def _read(source: str, settings: CollectSettings) -> Iterator[Text]:
    path = Path(source)
    if not path.exists() and path.suffix not in SUFFIXES:
        name, _, config = source.partition(":")
        return _rows(_load(settings, name, config or None), source, settings)
    if not path.exists():
        raise ValueError("there is no such file")
    if path.suffix == ".txt":
        if settings.chat_template:
            raise ValueError("it is plain text, but --chat_template needs a column of messages")
        return (Text(text, path.stem) for text in split_text(path))
    if path.suffix not in BUILDERS:
        raise ValueError(f"it is not one of the known kinds: {', '.join(SUFFIXES)}")
    return _rows(_load_file(path), path.stem, settings)


def split_text(path: Path) -> Iterator[str]:
    """The documents of a text file, divided by lines `<|endoftext|>`."""
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.rstrip("\n") == SEPARATOR:
                yield "".join(lines)
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def _load(settings: CollectSettings, name: str, config: str | None) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    rows: Iterable[dict[str, Any]] = load_dataset(
        name, config, split=settings.split, streaming=settings.streaming
    )
    return rows


def _load_file(path: Path) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    if not path.stat().st_size:  # datasets fails on it
        return []
    rows: Iterable[dict[str, Any]] = load_dataset(
        BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True
    )
    return rows


def _rows(rows: Iterable[dict[str, Any]], label: str, settings: CollectSettings) -> Iterator[Text]:
    for row in rows:
        for column in (settings.text_column, settings.label_column):
            if column is not None and column not in row:
                raise ValueError(f"no column {column!r}; its columns are {', '.join(row)}")
        label_column = settings.label_column
        yield Text(row[settings.text_column], str(row[label_column]) if label_column else label)


def _not_blank(content: Any) -> bool:
    return bool(content.strip() if isinstance(content, str) else content)


def tokenize(
    texts: Iterable[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    chat_template: bool = False,
    answer: bool = False,
) -> Iterator[Prompt]:
    """Token ids of each document, cut to `max_tokens`; documents without tokens are left out.

    With `answer`, a chat ends with the opening of the assistant's next message.
    Raises ValueError for a column that holds neither text nor, with `chat_template`, messages.
    """
    number = 0
    for text in texts:
        if chat_template:
            rendered = _render(text.content, tokenizer, answer)
            ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        elif isinstance(text.content, str):
            ids = tokenizer(text.content, verbose=False)["input_ids"]
        else:
            raise ValueError(
                f"the column of {text.label} holds {type(text.content).__name__}, not text; "
                "give --column, or --chat_template true for messages"
            )
        if ids:
            cut = max(0, len(ids) - max_tokens)
            yield Prompt(number, ids[:max_tokens], text.label, cut)
            number += 1


def _render(messages: Any, tokenizer: PreTrainedTokenizerBase, answer: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template")
    if not isinstance(messages, list):
        raise ValueError(f"--chat_template needs lists of messages, not {messages!r:.80}")
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    assert isinstance(rendered, str)
    return rendered
