"""The division of recorded documents: three parts, no text in two of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from predictor.adaptation.division import Division, divide
from routing.shards import Document, TraceReader
from routing.writer import TraceWriter
from tests.helpers.predicting import TOPOLOGY, random_document, write_trace


def texts(part: Division, name: str) -> list[bytes]:
    return [document.token_ids_T.tobytes() for document in getattr(part, name)]


def write_documents(directory: Path, documents: list[Document]) -> list[TraceReader]:
    with TraceWriter(directory, TOPOLOGY, provenance={}) as writer:
        for document in documents:
            writer.add({"decoder": document})
    return [TraceReader(directory)]


def some(count: int, length: int = 20, seed: int = 0) -> list[Document]:
    generator = np.random.default_rng(seed)
    return [random_document(generator, length) for _ in range(count)]


def test_no_text_is_in_two_parts_even_where_documents_repeat(tmp_path: Path) -> None:
    documents = some(20)
    readers = write_documents(tmp_path / "trace", [*documents, *documents[::2]])
    parts = divide(readers, share=0.2, most_tokens=1000)
    found = [set(texts(parts, name)) for name in Division._fields]
    assert sum(map(len, found)) == len(set.union(*found)) == 20
    assert sum(parts.tokens.values()) == 30 * 20


def test_held_out_parts_have_their_share_and_at_most_so_many_tokens(tmp_path: Path) -> None:
    readers = write_documents(tmp_path / "trace", some(50))
    shared = divide(readers, share=0.2, most_tokens=10_000).tokens
    assert shared["stopping"] == pytest.approx(200, abs=20) == shared["held_out"]
    capped = divide(readers, share=0.2, most_tokens=100).tokens
    assert capped["held_out"] == capped["stopping"] == 100


def test_fewer_training_tokens_leave_the_held_out_parts_as_they_are(tmp_path: Path) -> None:
    readers = write_documents(tmp_path / "trace", some(50))
    whole, part = (
        divide(readers, share=0.1, most_tokens=1000, max_tokens=limit) for limit in (None, 200)
    )
    assert part.tokens["train"] == 200 < whole.tokens["train"]
    assert texts(part, "held_out") == texts(whole, "held_out")
    assert texts(part, "stopping") == texts(whole, "stopping")
    assert set(texts(part, "train")) < set(texts(whole, "train"))


def test_three_texts_are_enough_and_one_is_in_each_part(tmp_path: Path) -> None:
    readers = write_documents(tmp_path / "trace", some(3))
    assert divide(readers, share=0.4, most_tokens=1000).tokens == dict.fromkeys(
        Division._fields, 20
    )


def test_fewer_than_three_texts_are_refused_with_the_remedy(tmp_path: Path) -> None:
    readers = write_documents(tmp_path / "trace", some(2) * 2)
    with pytest.raises(ValueError, match=r"2 different document\(s\).*record more"):
        divide(readers, share=0.1, most_tokens=1000)


def test_documents_of_all_traces_are_divided_together(tmp_path: Path) -> None:
    readers = [TraceReader(write_trace(tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    parts = divide(readers, share=0.1, most_tokens=10**6)
    assert sum(parts.tokens.values()) == sum(reader.num_tokens for reader in readers)
