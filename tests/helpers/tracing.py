"""Tracing in one line, for the tests of trace.collect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from routing.shards import Document, TraceReader
from tests.helpers.tiny import tiny_tokenizer
from trace.collect import collect
from trace.settings import CollectSettings
from trace.sources import SEPARATOR

TEXTS = [f"{'documents of many lengths ' * (7 * n % 5)}number {n}" for n in range(12)]

Directory = Callable[[str], Path]
"""The fixture `tiny_directory`."""


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text(f"\n{SEPARATOR}\n".join(texts))
    return path


def trace(model: Path, data: Path, out: Path, **options: Any) -> list[Document]:
    collect(
        CollectSettings(
            model=str(model), dataset=[str(data)], out=str(out), **{"batch_tokens": 512, **options}
        )
    )
    return list(TraceReader(out, verify=True).documents())


def decode(ids_T: np.ndarray) -> str:
    return str(tiny_tokenizer().decode(ids_T)).strip()


def assert_same_documents(ours: list[Document], theirs: list[Document]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.label == other.label
        for field in ("token_ids_T", "experts_TLK", "phase_T", "weights_TLK"):
            left, right = getattr(one, field), getattr(other, field)
            assert (left is None and right is None) or left.tobytes() == right.tobytes(), field
