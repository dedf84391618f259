"""Texts in windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WINDOW = 512
SAMPLE = Path(__file__).resolve().parents[2] / "exports" / "sample"
"""Texts that are shipped; the models beside them were not trained on these documents."""


class Text(NamedTuple):
    """A text and the name to report it by."""

    name: str
    content: str


def read_texts(paths: Sequence[str | Path]) -> list[Text]:
    """The texts of files. Raises ValueError for one that is missing or no text."""
    return [Text(Path(path).name, _read(Path(path))) for path in paths]


def sample_halves() -> tuple[list[Text], list[Text]]:
    """First and second halves of the shipped texts; none where they are not installed."""
    whole = read_texts(sorted(SAMPLE.glob("*.txt")))
    halves = [(one.content[: len(one.content) // 2], one) for one in whole]
    first = [Text(f"sample/{one.name}, first half", half) for half, one in halves]
    second = [
        Text(f"sample/{one.name}, second half", one.content[len(half) :]) for half, one in halves
    ]
    return first, second


def windows(texts: Sequence[Text], tokenizer: Any, num_tokens: int) -> list[Tensor]:
    """Windows int64 [1, T] of at most `num_tokens` tokens in all, taken from the texts in turns.

    Raises ValueError for texts of less than two tokens together.
    """
    rows = [_windows_of(text.content, tokenizer, num_tokens) for text in texts]
    turns = [row for turn in zip_longest(*rows) for row in turn if row is not None]
    chosen = list(islice(turns, max(1, num_tokens // WINDOW)))
    if not chosen:
        names = ", ".join(text.name for text in texts)
        raise ValueError(f"{names}: too little text; two tokens are the least")
    return [row[:, :num_tokens] if num_tokens > 1 else row[:, :2] for row in chosen]


def _windows_of(content: str, tokenizer: Any, num_tokens: int) -> list[Tensor]:
    """Whole windows, or the one that there is."""
    from transformers.utils import logging  # a text is longer than a model's context on purpose

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # a token has less than 16 characters on average
        ids = tokenizer(content[: (num_tokens + WINDOW) * 16])["input_ids"]
    finally:
        logging.set_verbosity(verbosity)
    ids_T = torch.tensor(ids[: num_tokens + WINDOW], dtype=torch.int64)
    whole = len(ids_T) // WINDOW * WINDOW
    if whole == 0:
        return [ids_T[None]] if len(ids_T) > 1 else []
    return list(ids_T[:whole].view(-1, 1, WINDOW))


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is no text file")
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason})") from error
