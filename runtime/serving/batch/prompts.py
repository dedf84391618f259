"""Rows of a data set as requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.serving.chat import render_chat
from runtime.serving.request import Request

OPTIONS: dict[str, type | tuple[type, ...]] = {
    "max_tokens": int,
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": int,
    "seed": int,
    "priority": int,
    "label": str,
    "ignore_eos": bool,
}
"""What a row may say for itself, beside `prompt` or `messages`, `stop` and `id`."""

Row = dict[str, Any] | ValueError


def read_rows(dataset: str, split: str) -> Iterator[Row]:
    """Every row of a .jsonl, .txt (a prompt a line) or .parquet file, or of a data set on the Hub.

    A line that is no JSON object becomes the ValueError that says so.
    """
    path = Path(dataset)
    if path.suffix in (".jsonl", ".txt"):
        if not path.is_file():
            raise ValueError(f"there is no file {dataset}")
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = line.rstrip("\r\n")
                yield {"prompt": text} if path.suffix == ".txt" else _parse(text)
        return
    yield from _load(path, dataset, split)


def _parse(line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(f"the line is not JSON: {error}")
    return row if isinstance(row, dict) else ValueError("the line is not a JSON object")


def _load(path: Path, dataset: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        if path.suffix == ".parquet":
            yield from datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            yield from datasets.load_dataset(dataset, split=split)
    except Exception as error:  # the hub client raises many kinds, none of them ours to tell apart
        raise ValueError(
            f"{dataset} cannot be read ({' '.join(str(error).split()):.200})"
        ) from error


def to_request(row: Row, id: str, tokenizer: Any, defaults: dict[str, Any]) -> Request:
    """The request of one row. Raises ValueError for a row that makes none."""
    if isinstance(row, ValueError):
        raise row
    options = {key: row[key] for key in OPTIONS if row.get(key) is not None}
    for key, value in options.items():
        if not isinstance(value, OPTIONS[key]) or (isinstance(value, bool) and key != "ignore_eos"):
            raise ValueError(f"{key}={value!r} is of the wrong type")
    if row.get("stop") is not None:
        stop = row["stop"]
        options["stop"] = (stop,) if isinstance(stop, str) else stop
        if not all(isinstance(text, str) for text in options["stop"]):
            raise ValueError(f"stop={stop!r} is neither text nor a list of texts")
        options["stop"] = tuple(options["stop"])
    return Request(prompt=_prompt(row, tokenizer), id=id, **(defaults | options))


def _prompt(row: dict[str, Any], tokenizer: Any) -> str | list[int]:
    if row.get("messages") is not None:
        return render_chat(tokenizer, row["messages"])
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError("the row has neither a prompt of text nor messages")
    return prompt
