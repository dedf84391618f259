"""Traces: every damage is refused by name, equal runs give equal bytes, one writer at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save

from routing.shards import MANIFEST, TraceReader
from routing.topology import Layer, Stack, Topology
from routing.trace_format.lock import DirectoryLock
from routing.trace_format.manifest import CHECKSUM, read_manifest, write_manifest
from routing.trace_format.shard_checks import check_values
from routing.writer import TraceWriter, serialize
from tests.helpers.corruption import read_trace, unnoticed, write_small_trace
from tests.helpers.predicting import TOPOLOGY, random_document, write_trace

ROOT = Path(__file__).parents[2]
SHARD = "decoder-00001.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_trace(tmp_path_factory.mktemp("integrity") / "trace")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_small_trace(tmp_path / "trace")


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it a right checksum: what no checksum can see."""
    manifest = read_manifest(directory)
    change(manifest)
    write_manifest(directory, manifest)


def edit_shard(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a shard, and size and checksum in the manifest with them."""
    path = directory / SHARD
    tensors = load(path.read_bytes())
    header = path.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    change(tensors)
    path.write_bytes(save(tensors, metadata))
    manifest = json.loads((directory / MANIFEST).read_text())
    entry = next(e for e in manifest["shards"]["decoder"] if e["file"] == SHARD)
    entry["bytes"] = path.stat().st_size
    del entry["sha256"]
    write_manifest(directory, manifest)


# ---------------------------------------------------------------------- damage


def test_no_random_damage_to_a_trace_goes_unseen(whole: Path) -> None:
    assert unnoticed(whole, read_trace, count=270) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(num_documents=-5), "num_documents is -5, not a count"),
        (lambda m: m.update(num_documents=True), "num_documents is True, not a count"),
        (lambda m: m.update(num_documents=6), "num_documents is 6, but the encoder shards list 5"),
        (lambda m: m.update(complete="no"), "complete is 'no', not true or false"),
        (lambda m: m.update(labels=["a", 3]), "labels is .* not a list of names"),
        (lambda m: m.update(labels=["a", "a"]), "a label is listed twice"),
        (lambda m: m.update(lookahead={"gate": -1}), "lookahead is .* not distances by source"),
        (lambda m: m.update(shards=[]), r"shards is \[\], not an object"),
        (lambda m: m["shards"].pop("encoder"), r"its shards are of \['decoder'\]"),
        (lambda m: m["shards"]["decoder"].append(m["shards"]["decoder"][0]), "listed twice"),
        (lambda m: m["shards"]["decoder"].pop(), "but the decoder shards list"),
        (lambda m: m["shards"]["decoder"][0].update(tokens=-3), "shard 0: tokens is -3, not a c"),
        (lambda m: m["shards"]["decoder"][0].update(bytes=1.5), "shard 0: bytes is 1.5, not a co"),
        (lambda m: m["shards"]["decoder"][0].update(bytes=None), "shard 0: bytes is None"),
        (lambda m: m["shards"]["decoder"][0].pop("file"), "shard 0: file is missing"),
        (lambda m: m["shards"]["decoder"][0].update(file="../x"), "not the name of a file in the"),
        (lambda m: m["shards"]["decoder"][0].update(file="/etc/passwd"), "not the name of a file"),
        (lambda m: m["shards"]["decoder"][0].update(file=".."), "not the name of a file in the"),
        (lambda m: m["shards"]["decoder"][0].update(file="a\\b"), "not the name of a file in the"),
        (lambda m: m["topology"]["stacks"][0]["layers"].append(["x", -2, 1]), "no MoE layer"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_by_name(
    trace: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(trace, change)
    for opened in (TraceReader, read_manifest):
        with pytest.raises(ValueError, match=rf"manifest\.json is damaged: .*{message}"):
            opened(trace)


def test_a_shard_with_another_number_of_tokens_or_documents_is_refused(trace: Path) -> None:
    edit(trace, lambda m: m["shards"]["decoder"][1].update(tokens=7))
    with pytest.raises(ValueError, match=rf"{SHARD} is damaged: token_ids is int32 .* \[7\]"):
        TraceReader(trace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["experts"].__setitem__((0, 0, 0), 8), "layers.0 name expert 8, but the layer"),
        (lambda t: t["token_ids"].__setitem__(0, -1), "token_ids are not within the vocabulary"),
        (lambda t: t["token_ids"].__setitem__(0, 99), "token_ids are not within the vocabulary"),
        (lambda t: t["phase"].__setitem__(0, 2), "phase is 2"),
        (lambda t: t["doc_labels"].__setitem__(0, 9), "doc_labels are not within the 6 labels"),
        (lambda t: t["doc_labels"].__setitem__(0, -1), "doc_labels are not within the 6 labels"),
        (lambda t: t["doc_offsets"].__setitem__(0, 1), "doc_offsets do not rise"),
        (lambda t: t["doc_offsets"].__setitem__(-1, 99), "doc_offsets do not rise"),
        (lambda t: t["doc_offsets"].__setitem__(1, -4), "doc_offsets do not rise"),
        (lambda t: t["weights"].__setitem__((0, 0, 0), np.nan), "weights holds NaN"),
        (
            lambda t: t["lookahead.gate.scores"].__setitem__((0, 0, 0, 0), np.nan),
            "lookahead.gate.scores holds NaN",
        ),
        (lambda t: t.update(experts=t["experts"].astype(np.int64)), "experts is int64"),
        (lambda t: t.update(experts=t["experts"][:, :2].copy()), "experts is uint8"),
        (lambda t: t.pop("weights"), "it lacks the tensor weights"),
        (lambda t: t.pop("lookahead.gate.experts"), "it lacks the tensor lookahead.gate.experts"),
    ],
)
def test_a_shard_whose_values_cannot_be_is_refused_by_name(
    trace: Path, change: Callable[[dict[str, np.ndarray]], object], message: str
) -> None:
    edit_shard(trace, change)
    with pytest.raises(ValueError, match=rf"{SHARD} is damaged: .*{message}"):
        TraceReader(trace)


def test_a_shard_of_another_stack_is_refused(trace: Path) -> None:
    def exchange(manifest: dict[str, Any]) -> None:
        shards = manifest["shards"]
        shards["encoder"], shards["decoder"] = shards["decoder"], shards["encoder"]

    edit(trace, exchange)
    with pytest.raises(ValueError, match="of the encoder stack, not of the decoder stack"):
        TraceReader(trace)


@pytest.mark.parametrize(("size", "worst"), [(8, 255), (256, 255), (300, 65535)])
def test_no_expert_is_allowed_and_every_expert_of_the_layer(size: int, worst: int) -> None:
    stack = Stack(name="decoder", layers=(Layer("a", size, 2),))
    experts = np.array([[[0, size - 1]], [[worst, 1]]], np.uint8 if size <= 256 else np.uint16)
    tensors: dict[str, np.ndarray] = {
        "token_ids": np.zeros(2, np.int32),
        "phase": np.zeros(2, np.uint8),
    }
    check_values(tensors | {"experts": experts}, stack, 9)


def test_an_edited_manifest_is_refused_and_an_older_one_is_read_with_a_warning(
    trace: Path,
) -> None:
    expected = read_trace(trace)
    text = (trace / MANIFEST).read_text()
    (trace / MANIFEST).write_text(text.replace('"toy"', '"top"'))
    with pytest.raises(ValueError, match=r"manifest\.json does not match its own checksum"):
        TraceReader(trace)
    older = json.loads(text)
    del older[CHECKSUM]
    (trace / MANIFEST).write_text(json.dumps(older))
    assert read_trace(trace) == expected
    with pytest.warns(UserWarning, match=r"manifest\.json has no checksum, as older versions"):
        TraceReader(trace)


def test_a_trace_is_not_resumed_when_one_of_its_shards_is_gone(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, TOPOLOGY, provenance={}, shard_tokens=1)
    writer.add({"decoder": random_document(np.random.default_rng(0), 4)})
    writer.release()
    (tmp_path / "decoder-00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"decoder-00000\.safetensors is missing"):
        TraceWriter(tmp_path, TOPOLOGY, provenance={}, shard_tokens=1)


# ---------------------------------------------------------------------- equal bytes


def test_equal_runs_write_equal_bytes_in_every_process(tmp_path: Path) -> None:
    """The safetensors library orders a header's metadata at random, process by process."""
    contents = []
    for number in range(3):
        out = tmp_path / str(number)
        code = (
            "import sys; from pathlib import Path; from tests.helpers.corruption import *;"
            "write_small_trace(Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True)
        contents.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) > 4


def test_serialized_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {
        "b": np.arange(6).reshape(2, 3),
        "a": np.zeros((0, 2), np.float16),
    }
    metadata = {"z": 'ü ∑ \\ " \n 漢', "a": "1"}
    data = serialize(tensors, metadata)
    back = load(data)
    assert {name: x.tolist() for name, x in back.items()} == {
        name: x.tolist() for name, x in tensors.items()
    }
    (tmp_path / "x").write_bytes(data)
    with safe_open(tmp_path / "x", framework="np") as file:
        assert file.metadata() == metadata


# ---------------------------------------------------------------------- one writer

HOLD = """
import sys
from routing.writer import TraceWriter
from tests.helpers.predicting import TOPOLOGY
writer = TraceWriter(sys.argv[1], TOPOLOGY, provenance={})
print("open", flush=True)
sys.stdin.read()
"""


def test_two_processes_cannot_write_into_one_directory(tmp_path: Path) -> None:
    out = tmp_path / "trace"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == b"open\n"
    with pytest.raises(ValueError, match=rf"another writer is at work in {out}"):
        TraceWriter(out, TOPOLOGY, provenance={})
    other.kill()  # its lock ends with it
    other.communicate()
    with TraceWriter(out, TOPOLOGY, provenance={}) as writer:
        writer.add({"decoder": random_document(np.random.default_rng(0), 4)})
    assert len(TraceReader(out)) == 1


def test_where_directories_cannot_be_locked_a_file_in_them_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    flock = fcntl.flock

    def no_directories(file: int, operation: int) -> None:
        if Path(f"/proc/self/fd/{file}").is_dir():
            raise OSError("bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", no_directories)
    lock = DirectoryLock(tmp_path)
    with pytest.raises(ValueError, match="another writer"):
        DirectoryLock(tmp_path)
    lock.release()
    DirectoryLock(tmp_path).release()


def test_a_writer_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), TraceWriter(tmp_path / "out", TOPOLOGY, provenance={}):
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()


def test_nothing_is_added_to_a_complete_trace(tmp_path: Path) -> None:
    write_trace(tmp_path, num_documents=2)
    writer = TraceWriter(tmp_path, TOPOLOGY, provenance={"seed": 0}, shard_tokens=600)
    with pytest.raises(ValueError, match="is complete: name another directory"):
        writer.add({"decoder": random_document(np.random.default_rng(0), 4)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids_T": np.full(4, 99, np.int32)}, "token_ids are not within the vocabulary"),
        ({"experts_TLK": np.full((4, 3, 2), 9, np.uint8)}, "name expert 9, but the layer has 8"),
        ({"experts_TLK": np.zeros((3, 3, 2), np.uint8)}, "experts is uint8"),
        ({"phase_T": np.full(4, 7, np.uint8)}, "phase is 7"),
    ],
)
def test_a_document_that_no_reader_would_accept_is_not_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good = random_document(np.random.default_rng(0), 4)
    writer = TraceWriter(tmp_path, TOPOLOGY, provenance={}, shard_tokens=1)
    writer.add({"decoder": good})
    with pytest.raises(ValueError, match=rf"not written into {tmp_path}: .*{message}"):
        writer.add({"decoder": good._replace(**change)})
    assert len(TraceReader(tmp_path)) == 1


def test_a_topology_with_impossible_numbers_is_refused() -> None:
    data = TOPOLOGY.to_json()
    for layer in (["a", -1, 1], ["a", 8, 0], ["a", 8.5, 2], ["a", True, 1], ["a", 8], [3, 8, 2]):
        data["stacks"][0]["layers"][0] = layer
        with pytest.raises(ValueError, match="not a routing topology"):
            Topology.from_json(data)
