"""trace.inspect: the figures it prints, the picture it draws, the damage it finds."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.image import imread

import trace.usage
from routing.shards import GENERATED, PROMPT, Document, TraceReader
from routing.topology import Layer, Stack, Topology
from routing.writer import TraceWriter
from trace.inspect import inspect, main
from trace.settings import InspectSettings
from trace.usage import compare_with_previous, count_experts, measure_usage

E, K = 4, 2
NOTHING = 255
DECODER = Stack(name="decoder", layers=(Layer("a", E, K), Layer("b", E, K)))
ENCODER = Stack(name="encoder", layers=(Layer("c", E, K),))


def document(experts_TLK: object, label: str, num_prompt: int = 99) -> Document:
    experts = np.array(experts_TLK, np.uint8)
    phase_T = np.where(np.arange(len(experts)) < num_prompt, PROMPT, GENERATED)
    return Document(np.arange(len(experts)), experts, phase_T, label)


def write(path: Path, *documents: dict[str, Document], stacks: tuple[Stack, ...]) -> Path:
    topology = Topology(model_type="toy", vocab_size=99, stacks=stacks, model="f00d")
    with TraceWriter(path, topology, provenance={"model": "toy"}) as writer:
        for stacks_documents in documents:
            writer.add(stacks_documents)
    return path


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Layer a: always experts 0 and 1. Layer b: 0 and 1, then 2 and 3, in alternation."""
    alternating = [[[0, 1], [0, 1]], [[0, 1], [2, 3]], [[0, 1], [0, 1]], [[0, 1], [2, 3]]]
    return write(
        tmp_path / "toy",
        {"decoder": document(alternating, "prose", num_prompt=3)},
        {"decoder": document(alternating[:2], "code")},
        stacks=(DECODER,),
    )


def test_figures_of_a_trace_worked_out_by_hand(toy: Path) -> None:
    usage = measure_usage(TraceReader(toy))
    assert usage.labels == ["prose", "code"]
    assert usage.documents_D.tolist() == [1, 1]
    assert usage.tokens_D.tolist() == [4, 2]
    assert (usage.num_tokens, usage.prompt_tokens) == (6, 5)
    assert usage.counts_LE.tolist() == [[6, 6, 0, 0], [3, 3, 3, 3]]
    assert usage.entropy_L.tolist() == [1, 2]
    assert usage.max_entropy_L.tolist() == [2, 2]
    assert usage.top_share_L.tolist() == [1, 0.5]
    assert usage.top_share_D.tolist() == [0.75, 0.75]
    assert usage.overlap_L.tolist() == [1, 0]


def test_the_summary_names_model_labels_layers_and_phases(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(InspectSettings(directory=str(toy)))
    printed = capsys.readouterr().out
    for text in ("toy (decoder 2 x 4, top-2", "5 of prompts, 1 generated", "prose", "2.00 of 2.00"):
        assert text in printed


def test_every_stack_gets_a_picture(tmp_path: Path) -> None:
    whole = {
        "decoder": document([[[0, 1], [2, NOTHING]]], "x"),
        "encoder": document([[[0, 3]], [[NOTHING, NOTHING]]], "x"),
    }
    path = write(tmp_path / "both", whole, stacks=(ENCODER, DECODER))
    inspect(InspectSettings(directory=str(path), picture=str(tmp_path / "seen.png")))
    for name in ("seen.png", "seen-encoder.png"):
        assert imread(tmp_path / name)[..., :3].std() > 0.05, "a blank picture"


def test_many_labels_are_drawn_and_named(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [
        {"decoder": document(random.integers(0, E, (3 + n, 2, K)), f"domain{n}")} for n in range(30)
    ]
    path = write(tmp_path / "many", *documents, stacks=(DECODER,))
    inspect(InspectSettings(directory=str(path)))
    assert (path / "usage.png").stat().st_size > 10_000


def test_verify_finds_a_changed_shard(toy: Path) -> None:
    shard = toy / "decoder-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    inspect(InspectSettings(directory=str(toy), verify=False))
    with pytest.raises(ValueError, match=r"decoder-00000.safetensors does not match its checksum"):
        inspect(InspectSettings(directory=str(toy)))


def test_a_directory_without_a_trace_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path)])
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "is not a trace: it has no manifest.json" in line


def test_reading_in_chunks_changes_nothing(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_usage(TraceReader(toy))
    for size in (1, 3):
        monkeypatch.setattr(trace.usage, "CHUNK_TOKENS", size)
        chunked = measure_usage(TraceReader(toy))
        assert np.array_equal(chunked.counts_DLE, whole.counts_DLE)
        assert np.array_equal(chunked.overlap_L, whole.overlap_L)


traces = arrays(np.uint8, (7, 2, K), elements=st.sampled_from([0, 1, 2, 3, NOTHING]))


@given(traces)
def test_counts_and_overlap_are_those_of_sets(experts_TLK: np.ndarray) -> None:
    counts_LE = count_experts(experts_TLK, E)
    same_L, compared_L = compare_with_previous(experts_TLK, E)
    for layer in range(2):
        tokens = [[int(e) for e in row if e != NOTHING] for row in experts_TLK[:, layer]]
        assert counts_LE[layer].tolist() == [sum(t.count(e) for t in tokens) for e in range(E)]
        assert compared_L[layer] == sum(map(len, tokens[1:]))
        assert same_L[layer] == sum(e in before for before, now in pairwise(tokens) for e in now)


def test_layers_and_labels_with_long_names_are_told_apart_at_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"model.language_model.decoder.layers.{n}.feed_forward.experts" for n in (10, 11)]
    stack = Stack(name="decoder", layers=tuple(Layer(name, E, K) for name in names))
    labels = [f"corpora/of/the/web/in/many/languages/and/scripts/part-{n}" for n in range(2)]
    documents = [{"decoder": document([[[0, 1], [2, 3]]], label)} for label in labels]
    inspect(InspectSettings(directory=str(write(tmp_path / "t", *documents, stacks=(stack,)))))
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*names, *labels))
