"""Requests whose prompts are passages of text, labelled by domain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.serving.load import TextLoad

if TYPE_CHECKING:
    from runtime.serving.request import Request

SEPARATOR = "<|endoftext|>"


def text_requests(settings: TextLoad) -> list[Request]:
    """The requests of a load in random order, labelled by domain, the same for every arm.

    Raises ValueError if there is no text file.
    """
    from routing.pretrained import read_tokenizer
    from runtime.serving.request import Request

    tokenizer = read_tokenizer(settings.model)
    random = np.random.default_rng(settings.seed)
    files = sorted(settings.text.glob("*.txt"))
    if not files:
        raise ValueError(f"there are no .txt files in {settings.text}")
    prompts = [
        (file.stem, ids)
        for file in files
        for ids in _prompts(file, tokenizer, random, settings, -(-settings.requests // len(files)))
    ]
    low, high = settings.output_tokens
    return [
        Request(
            id=str(number),
            prompt=ids,
            label=label,
            ignore_eos=True,
            max_tokens=int(random.integers(low, high + 1)),
        )
        for number, (label, ids) in enumerate(prompts[i] for i in random.permutation(len(prompts)))
    ][: settings.requests]


def _prompts(
    file: Path, tokenizer: Any, random: np.random.Generator, settings: TextLoad, count: int
) -> Iterator[list[int]]:
    """`count` passages of a domain: its documents' beginnings, then further on in the longest."""
    documents = [text for text in file.read_text().split(f"\n{SEPARATOR}\n") if text.strip()]
    longest = settings.prompt_tokens[1]
    starts = [
        (text, at) for at in range(0, 40) for text in documents if len(text) > 6 * longest * at
    ]
    for text, at in starts[:count]:
        ids = tokenizer(text[6 * longest * at : 6 * longest * (at + 1)]).input_ids
        yield ids[: int(random.integers(settings.prompt_tokens[0], longest + 1))]
