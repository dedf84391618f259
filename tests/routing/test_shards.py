"""routing.shards: written documents are read back, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.shards import (
    GENERATED,
    MANIFEST,
    PROMPT,
    Document,
    TraceReader,
    experts_dtype,
    signed_experts,
    stored_experts,
)
from routing.topology import NO_EXPERT, Layer, Stack, Topology
from routing.trace_format.manifest import write_manifest
from routing.writer import TraceWriter

ROOT = Path(__file__).parents[2]
PROVENANCE = {"dataset": ["a.txt"], "seed": 0}


def a_topology(num_experts: int = 8, stacks: tuple[str, ...] = ("decoder",)) -> Topology:
    """Two layers, top-3."""
    layers = tuple(Layer(f"layers.{n}", num_experts, 3) for n in range(2))
    return Topology(
        model_type="olmoe",
        vocab_size=1000,
        stacks=tuple(Stack(name=name, layers=layers) for name in stacks),
        model=f"{num_experts:016x}",
    )


def a_document(
    seed: int, length: int = 6, num_experts: int = 8, label: str = "text", *, weights: bool = False
) -> Document:
    """A random document; about one in nine of its expert ids is missing where that is allowed."""
    random = np.random.default_rng(seed)
    least = 0 if num_experts == 256 else NO_EXPERT
    experts_TLK = random.integers(least, num_experts, (length, 2, 3))
    return Document(
        random.integers(0, 1000, length).astype(np.int32),
        stored_experts(experts_TLK, num_experts),
        np.sort(random.integers(PROMPT, GENERATED + 1, length)).astype(np.uint8),
        label,
        random.random((length, 2, 3)).astype(np.float16) if weights else None,
    )


def write(directory: Path, documents: Iterable[Document], **options: Any) -> None:
    options = {"provenance": PROVENANCE} | options
    with TraceWriter(directory, a_topology(), **options) as writer:
        for document in documents:
            writer.add({"decoder": document})


def assert_same(read: list[Document], written: list[Document]) -> None:
    assert len(read) == len(written)
    for one, other in zip(read, written, strict=True):
        assert one.label == other.label
        for field in ("token_ids_T", "experts_TLK", "phase_T", "weights_TLK"):
            ours, theirs = getattr(one, field), getattr(other, field)
            assert np.array_equal(ours, theirs), field
            assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None), field


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A trace of three documents, each in its own shard."""
    write(tmp_path / "trace", [a_document(n) for n in range(3)], shard_tokens=1)
    return tmp_path / "trace"


# ---------------------------------------------------------------------- round trips


@given(
    lengths=st.lists(st.integers(0, 9), max_size=8),
    num_experts=st.sampled_from([1, 8, 255, 256, 257, 300, 65535]),
    shard_tokens=st.integers(1, 40),
    weights=st.booleans(),
)
def test_documents_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    num_experts: int,
    shard_tokens: int,
    weights: bool,
) -> None:
    directory = tmp_path_factory.mktemp("trace")
    written = [
        a_document(n, length, num_experts, "ab"[n % 2], weights=weights)
        for n, length in enumerate(lengths)
    ]
    with TraceWriter(
        directory,
        a_topology(num_experts),
        provenance=PROVENANCE,
        with_weights=weights,
        shard_tokens=shard_tokens,
    ) as writer:
        for document in written:
            writer.add({"decoder": document})
    reader = TraceReader(directory, verify=True)
    assert_same(list(reader.documents()), written)
    assert reader.topology == a_topology(num_experts)
    assert reader.doc_lengths.tolist() == lengths and reader.num_tokens == sum(lengths)
    assert [reader.labels[label] for label in reader.doc_labels] == [d.label for d in written]
    assert reader.complete and reader.provenance == PROVENANCE


@given(st.data(), st.sampled_from([1, 8, 128, 255, 257, 4096]))
def test_every_expert_id_and_no_expert_survive_storage(
    data: st.DataObject, num_experts: int
) -> None:
    ids = data.draw(st.lists(st.integers(NO_EXPERT, num_experts - 1)))
    stored = stored_experts(np.array(ids, np.int64), num_experts)
    assert stored.dtype == experts_dtype(num_experts)
    assert signed_experts(stored, num_experts).tolist() == ids


def test_ids_take_one_byte_up_to_256_experts_and_two_above() -> None:
    assert experts_dtype(256) is np.uint8 and experts_dtype(257) is np.uint16


def test_expert_255_of_256_is_an_expert_and_none_cannot_be_stored() -> None:
    assert signed_experts(stored_experts(np.array([255]), 256), 256).tolist() == [255]
    with pytest.raises(ValueError, match="without an expert cannot be stored for 256"):
        stored_experts(np.array([NO_EXPERT]), 256)


@pytest.mark.parametrize("bad", [-2, 8, 255])
def test_an_id_that_is_no_expert_of_the_layer_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=r"expert ids outside 0 \.\. 7"):
        stored_experts(np.array([0, bad]), 8)


def test_an_encoders_and_a_decoders_document_share_their_number(tmp_path: Path) -> None:
    topology = a_topology(stacks=("encoder", "decoder"))
    pairs = [{"encoder": a_document(n), "decoder": a_document(n + 50, 2)} for n in range(5)]
    with TraceWriter(tmp_path, topology, provenance={}, shard_tokens=9) as writer:
        for pair in pairs:
            writer.add(pair)
    for stack in ("encoder", "decoder"):
        assert_same(list(TraceReader(tmp_path, stack).documents()), [p[stack] for p in pairs])


def test_a_trace_without_documents_can_be_read(tmp_path: Path) -> None:
    write(tmp_path, [])
    reader = TraceReader(tmp_path)
    assert len(reader) == reader.num_tokens == 0 and list(reader.documents()) == []


@pytest.mark.parametrize("index", [-1, 3])
def test_a_missing_document_is_an_index_error(three: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"document {index} of 3"):
        TraceReader(three).document(index)


def test_a_missing_stack_is_refused(three: Path) -> None:
    with pytest.raises(ValueError, match="no 'encoder' MoE stack; it has: decoder"):
        TraceReader(three, "encoder")


# ---------------------------------------------------------------------- interruption


def test_an_interrupted_trace_resumes_without_losing_or_doubling_a_document(tmp_path: Path) -> None:
    documents = [a_document(n, label=f"label {n % 3}") for n in range(9)]
    done = 0
    for stop in (4, 5, 9):
        writer = TraceWriter(tmp_path, a_topology(), provenance=PROVENANCE, shard_tokens=12)
        assert writer.num_documents == done and not writer.complete
        for document in documents[done:stop]:
            writer.add({"decoder": document})
        done = writer.num_documents  # the rest was never flushed: lost with the process
        writer.release()
    assert done == 8
    with TraceWriter(tmp_path, a_topology(), provenance=PROVENANCE) as writer:
        writer.add({"decoder": documents[8]})
    assert_same(list(TraceReader(tmp_path, verify=True).documents()), documents)


def test_an_error_while_tracing_keeps_what_was_durable_and_leaves_the_trace_open(
    tmp_path: Path,
) -> None:
    def documents() -> Iterator[Document]:
        yield from (a_document(n) for n in range(3))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tmp_path, documents(), shard_tokens=12)
    reader = TraceReader(tmp_path)
    assert_same(list(reader.documents()), [a_document(n) for n in range(2)])
    assert not reader.complete


@pytest.mark.parametrize("call", range(8))
def test_whatever_step_of_writing_fails_the_directory_holds_whole_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Calls of fsync and replace in turn: manifest, shard 1, manifest, shard 2, manifest ..."""
    calls = iter(range(100))

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def fail(*args: Any) -> Any:
            if next(calls) == call:
                raise OSError("the disk is full")
            return function(*args)

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "replace", failing(os.replace))
        with pytest.raises(OSError, match="disk is full"):
            write(tmp_path, (a_document(n) for n in range(3)), shard_tokens=1)
    num_durable = max(call - 2, 0) // 4
    if (tmp_path / MANIFEST).exists():
        durable = list(TraceReader(tmp_path, verify=True).documents())
        assert_same(durable, [a_document(n) for n in range(num_durable)])
    else:
        assert call < 2
    assert reopen(tmp_path).num_documents == num_durable


KILLED = """
import sys
from tests.routing.test_shards import a_document, a_topology, PROVENANCE
from routing.writer import TraceWriter
writer = TraceWriter(sys.argv[1], a_topology(), provenance=PROVENANCE, shard_tokens=6)
for n in range(writer.num_documents, 1_000_000):
    writer.add({"decoder": a_document(n)})
    print(n, flush=True)
"""


def test_a_killed_trace_holds_whole_documents_and_resumes(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    printed = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    durable = list(TraceReader(tmp_path, verify=True).documents())
    assert len(durable) > printed[-1]
    assert_same(durable, [a_document(n) for n in range(len(durable))])
    with TraceWriter(tmp_path, a_topology(), provenance=PROVENANCE) as writer:
        assert writer.num_documents == len(durable)
        writer.add({"decoder": a_document(len(durable))})
    assert_same([list(TraceReader(tmp_path).documents())[-1]], [a_document(len(durable))])


# ---------------------------------------------------------------------- refusals


def reopen(directory: Path, topology: Topology | None = None, **options: Any) -> TraceWriter:
    return TraceWriter(
        directory, topology or a_topology(), **({"provenance": PROVENANCE} | options)
    )


def test_a_trace_of_another_model_is_refused_and_left_as_it_was(three: Path) -> None:
    before = contents(three)
    with pytest.raises(ValueError, match=r"the trace in .* is for olmoe .*, but this model is for"):
        reopen(three, a_topology(num_experts=16))
    assert contents(three) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provenance": PROVENANCE | {"seed": 1}}, "seed: 0 there, 1 here"),
        ({"provenance": PROVENANCE | {"cut": 9}}, "cut: None there, 9 here"),
        ({"with_weights": True}, "with_weights: False there, True here"),
    ],
)
def test_a_trace_with_other_options_is_refused_and_left_as_it_was(
    three: Path, options: dict[str, Any], message: str
) -> None:
    before = contents(three)
    with pytest.raises(ValueError, match=f"traced with other options .{message}"):
        reopen(three, **options)
    assert contents(three) == before


def test_a_directory_of_something_else_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no trace"):
        reopen(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_finished_trace_says_so(three: Path) -> None:
    writer = reopen(three)
    assert writer.complete and writer.num_documents == 3


@pytest.mark.parametrize("verify", [False, True])
def test_a_missing_shard_is_refused_by_name(three: Path, verify: bool) -> None:
    (three / "decoder-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"decoder-00001\.safetensors is missing"):
        TraceReader(three, verify=verify)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_refused_by_name(three: Path, keep: int) -> None:
    shard = three / "decoder-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"decoder-00002\.safetensors is truncated"):
        TraceReader(three)


def test_a_shard_with_one_flipped_bit_is_refused(three: Path) -> None:
    shard = three / "decoder-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"decoder-00000\.safetensors does not match its checksum"):
        TraceReader(three)


def test_a_shard_with_a_damaged_header_is_refused_by_name(three: Path) -> None:
    shard = three / "decoder-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[8:40] = bytes(32)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"decoder-00000\.safetensors is damaged"):
        TraceReader(three, verify=False)


def test_a_shard_of_another_models_trace_is_refused_by_name(three: Path, tmp_path: Path) -> None:
    other = a_topology(num_experts=16)
    with TraceWriter(tmp_path / "other", other, provenance={}, shard_tokens=1) as writer:
        writer.add({"decoder": a_document(0)})
    name, manifest = "decoder-00000.safetensors", json.loads((three / MANIFEST).read_text())
    (three / name).write_bytes((tmp_path / "other" / name).read_bytes())
    manifest["shards"]["decoder"][0]["bytes"] = (three / name).stat().st_size
    write_manifest(three, manifest)
    with pytest.raises(
        ValueError, match=r"the trace .* is for .*, but .*decoder-00000\.safetensors is for"
    ):
        TraceReader(three, verify=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema": 1}', '{"topology": {}}'])
def test_a_foreign_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    for opened in (TraceReader, reopen):
        with pytest.raises(ValueError, match=r"manifest\.json is not the manifest of a trace"):
            opened(tmp_path)
    assert contents(tmp_path) == {MANIFEST: text.encode()}


def test_a_manifest_of_a_later_schema_is_refused(three: Path) -> None:
    text = (three / MANIFEST).read_text()
    (three / MANIFEST).write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="has schema 2; this version reads schema 1"):
        TraceReader(three)


def test_a_directory_without_a_manifest_is_not_a_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a trace: it has no manifest\.json"):
        TraceReader(tmp_path)
