"""A predictor's file as a torch module: the same answers, and weights that can be put back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import exports
from predictor.adaptation.graph import GraphPredictor, put_back
from predictor.adaptation.starting import open_start, write_adapted
from predictor.file.documents import open_exported, whole_document
from predictor.file.quantization import dequantize, quantize
from predictor.networks.windows import Windows
from routing.predictor_file.checksum import CHECKSUM_KEY, UNSTAMPED, stamp
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import TOPOLOGY, VOCAB_SIZE, routes_by_rule
from tests.helpers.starting import int8_start, older_start, start_file

SHIPPED = Path(exports.__file__).parent / "predictors" / "moe-8x32.onnx"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_file(tmp_path_factory.mktemp("start") / "predictor.onnx")


@pytest.fixture(scope="module")
def int8(start: Path) -> Path:
    return int8_start(start)


def document(length: int, layers: int = 3, experts: int = 8, top_k: int = 2) -> Windows:
    generator = np.random.default_rng(length)
    tokens = generator.integers(VOCAB_SIZE, size=length)
    routes = generator.integers(experts, size=(length, layers, top_k)).astype(np.int16)
    if (layers, experts) == (3, 8):
        routes = routes_by_rule(tokens, 3).astype(np.int16)
    return whole_document(tokens, routes, length)


def without_far(path: Path, out: Path) -> Path:
    """The file as it was written before there was a far horizon."""
    model = onnx.load(path)
    (far,) = [value for value in model.graph.output if value.name == "far"]
    model.graph.output.remove(far)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, entries | {CHECKSUM_KEY: UNSTAMPED})
    onnx.save(model, out)
    stamp(out)
    return out


@torch.no_grad()
def largest_error(path: Path, batch: Windows) -> float:
    graph = open_start(path).graph()
    pairs = list(zip(graph(batch), open_exported(path)(batch), strict=False))
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def test_the_graph_answers_as_onnxruntime_does(start: Path) -> None:
    assert largest_error(start, document(23)) < 1e-4


def test_the_shipped_file_answers_as_in_onnxruntime() -> None:
    assert largest_error(SHIPPED, document(40, 8, 32, 4)) < 1e-3


def test_a_file_of_an_older_network_answers_as_in_onnxruntime(tmp_path: Path) -> None:
    older = older_start(tmp_path / "older.onnx")
    operators = {node.op_type for node in onnx.load(older).graph.node}
    assert "Relu" not in operators and operators & {"Erf", "Gelu"}
    assert largest_error(older, document(23)) < 1e-4


def test_a_file_without_a_far_head_has_three_heads_to_train(start: Path, tmp_path: Path) -> None:
    older = without_far(start, tmp_path / "older.onnx")
    assert len(open_start(older).graph()(document(9))) == 3
    assert largest_error(older, document(9)) < 1e-4


def test_int8_weights_are_trained_as_the_floats_that_they_stand_for(int8: Path) -> None:
    model = dequantize(onnx.load(int8))
    assert not {"MatMulNBits"} & {node.op_type for node in model.graph.node}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    again = dequantize(quantize(copy))
    for graph in (GraphPredictor(model, (2, 1, 8)), GraphPredictor(again, (2, 1, 8))):
        with torch.no_grad():
            answers = graph(document(30))
        exported = open_exported(int8)(document(30))
        for ours, theirs in zip(answers, exported, strict=True):
            assert float((ours - theirs).abs().max()) < 0.2 * float(theirs.std())


def test_every_weight_learns_and_no_constant_does(start: Path) -> None:
    graph = open_start(start).graph()
    batch = document(30)
    torch.stack([head.square().mean() for head in graph(batch)]).sum().backward()
    idle = [name for name, weight in graph.weights.items() if weight.grad is None]
    assert idle == []
    assert {"predictor.history_XD", "predictor.embedding_VR.weight"} <= graph.weights.keys()
    assert "exp" not in graph.weights  # the rotary embedding's frequencies


def test_trained_weights_are_in_the_written_file(start: Path, tmp_path: Path) -> None:
    opened = open_start(start)
    graph = opened.graph()
    with torch.no_grad():
        for weight in graph.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        expected = graph(document(20))
    path = write_adapted(opened, graph, document(20), tmp_path)
    for ours, theirs in zip(expected, open_exported(path)(document(20)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_a_written_graph_that_differs_is_refused(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_start(start)
    graph = opened.graph()
    with torch.no_grad():
        next(graph.parameters()).add_(1.0)
    monkeypatch.setattr("predictor.adaptation.starting.put_back", lambda model, graph: None)
    with pytest.raises(ValueError, match="differs from the trained one"):
        write_adapted(opened, graph, document(20), tmp_path)


def test_a_file_in_int8_stays_in_int8(int8: Path, tmp_path: Path) -> None:
    opened = open_start(int8)
    path = write_adapted(opened, opened.graph(), document(20), tmp_path)
    assert opened.is_int8 and open_start(path).is_int8
    assert "MatMulNBits" in {node.op_type for node in onnx.load(path).graph.node}


def test_the_start_is_left_as_it_is(start: Path) -> None:
    before = start.read_bytes()
    opened = open_start(start)
    graph = opened.graph()
    with torch.no_grad():
        next(graph.parameters()).add_(1.0)
    copy = onnx.ModelProto()
    copy.CopyFrom(opened.model)
    put_back(copy, graph)
    assert copy != opened.model and start.read_bytes() == before


def test_an_operator_that_cannot_be_trained_is_named(start: Path) -> None:
    model = onnx.load(start)
    (cos,) = [node for node in model.graph.node if node.op_type == "Cos"]
    cos.op_type = "Cosh"
    with pytest.raises(ValueError, match=r"Cosh.*expertflow train"):
        GraphPredictor(model, (2, 1, 8))


def test_a_t5_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"key/value cache are adapted.*expertflow train"):
        open_start(write_predictor(tmp_path / "t5.onnx", TOPOLOGY, cache=False))
