"""Export to ONNX: the file computes what torch computes, and appears only when it does."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from shutil import copy
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from predictor.export import ExportSettings, export
from predictor.file.exporter import write_quantized
from predictor.file.parity import check_parity
from predictor.file.quantization import block_size
from predictor.networks.causal import CausalPredictor
from predictor.networks.interface import PredictorSettings, RoutePredictor
from predictor.networks.t5 import T5Settings
from predictor.networks.windows import PredictorShape
from predictor.training.checkpoint import load_checkpoint
from predictor.training.module import RouteModule
from routing.cli import run
from routing.predictor_file.format import HEADS
from routing.process.output_lock import OutputLock
from routing.topology import NO_EXPERT, Topology
from tests.helpers.predicting import TOPOLOGY, tiny_predictor

METRICS = {"this_known": {"recall": [0.5, 0.6, 0.7]}}
T5 = T5Settings(width=16, mlp_width=32, blocks=1, attention_heads=2, head_width=8)


def write_checkpoint(path: Path, settings: PredictorSettings, weights: RoutePredictor) -> Path:
    """A checkpoint as training writes it, of a predictor with the given weights."""
    module = RouteModule(TOPOLOGY.to_json(), "decoder", 6, 3, settings)
    module.predictor.load_state_dict(weights.state_dict())
    module.report, module.provenance = METRICS, {"traces": [{"seed": 7}]}
    content: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def calibrated() -> CausalPredictor:
    predictor = tiny_predictor(window=6)
    predictor.set_calibration(
        torch.tensor([2.0, 0.9, 0.5, 0.7]), torch.tensor([0.3, -1.0, 0.0, 0.1])
    )
    return predictor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    predictor = calibrated()
    path = tmp_path_factory.mktemp("checkpoint") / "predictor.ckpt"
    return write_checkpoint(path, predictor.settings, predictor)


class Exported(NamedTuple):
    """A file, and what the command line printed and reported when it was written."""

    path: Path
    printed: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def export_run(checkpoint: Path) -> Exported:
    path = checkpoint.parent / "new" / "predictor.onnx"
    report = checkpoint.parent / "export.json"
    with redirect_stdout(io.StringIO()) as said:
        main(str(checkpoint), str(path), "--json", str(report))
    return Exported(path, said.getvalue(), json.loads(report.read_text()))


@pytest.fixture
def exported(export_run: Exported) -> Path:
    return export_run.path


def main(*argv: str) -> None:
    run(export, ExportSettings, list(argv), prog="export", positional=["checkpoint", "out"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    """Let the exporter copy the finished file instead of making it again."""
    monkeypatch.setattr("predictor.file.exporter.write_graph", lambda _, path: copy(exported, path))


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def metadata_of(path: Path) -> dict[str, Any]:
    entries = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert set(entries) == {"expertflow", "expertflow_checksum"}
    return dict(json.loads(entries["expertflow"]))


def test_the_graph_has_exactly_the_contracts_names_types_and_axes(exported):
    session = session_of(exported)
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
    assert inputs == {
        "token_ids": ("tensor(int64)", ["batch", "tokens"]),
        "routes": ("tensor(int64)", ["batch", "tokens", 3, 2]),
        "positions": ("tensor(int64)", ["batch", "tokens"]),
        "past": ("tensor(float)", [2, 2, "batch", 1, "past", 8]),
        "past_positions": ("tensor(int64)", ["batch", "past"]),
    }
    logits = ("tensor(float)", ["batch", "tokens", 3, 8])
    assert outputs == dict.fromkeys(HEADS, logits) | {
        "present": ("tensor(float)", [2, 2, "batch", 1, "tokens", 8])
    }
    (domain,) = [entry for entry in onnx.load(exported).opset_import if entry.domain == ""]
    assert domain.version == 20


def test_the_file_is_alone_and_complete(exported):
    assert list(exported.parent.iterdir()) == [exported]
    onnx.checker.check_model(exported)


def test_the_metadata_hold_all_that_the_runtime_needs(exported):
    meta = metadata_of(exported)
    assert Topology.from_json(meta.pop("topology")) == TOPOLOGY
    calibration = meta.pop("calibration")
    assert calibration["this"] == pytest.approx([2.0, 0.3])
    settings = meta["provenance"].pop("settings")
    assert settings["width"] == 16
    assert meta == {
        "schema": 1,
        "kind": "causal",
        "stack": "decoder",
        "window": 6,
        "horizon": 3,
        "cache": True,
        "blocks": 2,
        "heads": 1,
        "head_dim": 8,
        "quantization": "none",
        "metrics": METRICS,
        "provenance": {"traces": [{"seed": 7}]},
    }


def test_the_command_line_reports_the_file_and_its_parity(export_run):
    report = export_run.report
    assert report["file"] == str(export_run.path)
    assert report["MiB"] == pytest.approx(export_run.path.stat().st_size / 2**20, abs=0.01)
    assert 0 < report["max_error"] <= 1e-4 and report["top_k_overlap"] == 1.0
    first, second = export_run.printed.splitlines()
    assert first == f"wrote {export_run.path}, {report['MiB']} MiB"
    assert second.endswith("100.0% of the top K are the same")


def test_the_runtime_accepts_the_file(exported):
    from routing.predictor_file.reader import open_predictor

    file = open_predictor(exported)
    assert file.topology == TOPOLOGY and file.cached
    assert (file.window, file.horizon, file.cache_shape) == (6, 3, (2, 1, 8))


@pytest.mark.parametrize("sizes", [(1, 1, 0), (2, 9, 0), (1, 1, 6), (3, 1, 6), (2, 4, 5)])
def test_the_file_computes_what_torch_computes(exported, checkpoint, sizes):
    predictor = load_checkpoint(checkpoint).predictor
    inputs = predictor.random_inputs(*sizes)
    got = session_of(exported).run(None, {name: x.numpy() for name, x in inputs.items()})
    with torch.no_grad():
        expected = predictor.run_graph(*inputs.values())
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_padding_in_a_batch_changes_no_other_token(exported):
    session, predictor = session_of(exported), tiny_predictor()
    inputs = {name: x.numpy() for name, x in predictor.random_inputs(1, 5, 6).items()}
    alone = session.run(list(HEADS), inputs)
    pad = {"token_ids": 0, "positions": -1, "routes": NO_EXPERT}
    padded = inputs | {
        name: np.concatenate([np.full_like(inputs[name][:, :2], value), inputs[name]], 1)
        for name, value in pad.items()
    }
    for one, other in zip(alone, session.run(list(HEADS), padded), strict=True):
        np.testing.assert_allclose(other[:, 2:], one, atol=1e-5)
        assert np.isfinite(other).all()


@pytest.mark.parametrize(
    ("widths", "block"), [([448, 448, 1792, 224], 256), ([128, 128, 512], 128), ([8], 16)]
)
def test_a_block_of_int8_weights_is_as_long_as_the_predictor_is_wide(widths, block) -> None:
    weights = [numpy_helper.from_array(np.zeros((w, 2), np.float32), f"w{w}") for w in widths]
    products = [helper.make_node("MatMul", ["x", f"w{w}"], ["y"]) for w in widths]
    products.append(helper.make_node("MatMul", ["x", "x"], ["z"]))
    assert block_size(helper.make_graph(products, "graph", [], [], weights)) == block


def test_int8_keeps_the_metadata_and_most_of_the_top_k(exported, checkpoint, tmp_path):
    small = tmp_path / "small.onnx"
    write_quantized(exported, small)
    assert metadata_of(small) == metadata_of(exported) | {"quantization": "int8"}
    graph = onnx.load(small).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2 * 4 + 4, "4 matrices a block, 2 inputs, early and late heads"
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    matrices = [t for t in floats if not t.name.endswith("_scales")]
    assert all(min(t.dims, default=1) == 1 or len(t.dims) < 2 for t in matrices)
    predictor = load_checkpoint(checkpoint).predictor
    inputs = predictor.random_inputs(2, 9, 6)
    (got,) = session_of(small).run(["this"], {name: x.numpy() for name, x in inputs.items()})
    with torch.no_grad():
        expected = predictor.run_graph(*inputs.values())[0]
    best = expected.topk(2).indices
    assert (best[..., None] == torch.from_numpy(got).topk(2).indices[..., None, :]).any(
        -1
    ).float().mean() > 0.8


@pytest.mark.usefixtures("quick")
def test_int8_that_loses_too_much_of_the_top_k_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("predictor.file.parity.MIN_OVERLAP", 0.999)
    out = tmp_path / "small.onnx"
    with pytest.raises(ValueError, match="export without --int8"):
        export(ExportSettings(checkpoint=checkpoint, out=out, int8=True))
    assert not list(tmp_path.iterdir())


def test_the_papers_predictor_exports_without_a_cache(tmp_path):
    predictor = T5.build(PredictorShape.of(TOPOLOGY, "decoder", window=6, horizon=3)).eval()
    path = write_checkpoint(tmp_path / "t5.ckpt", T5, predictor)
    export(ExportSettings(checkpoint=path, out=tmp_path / "t5.onnx"))
    meta = metadata_of(tmp_path / "t5.onnx")
    assert meta["kind"] == "t5" and meta["cache"] is False and "blocks" not in meta
    inputs = {value.name: value.shape for value in session_of(tmp_path / "t5.onnx").get_inputs()}
    assert inputs == {
        "token_ids": ["batch", "tokens"],
        "positions": ["batch", "tokens"],
        "prompt_lengths": ["batch"],
    }


class Wrong(CausalPredictor):
    """Its graph forgets the cache."""

    def run_graph(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *rest, past_positions = inputs
        return super().run_graph(*rest, torch.full_like(past_positions, -1))


def test_a_graph_that_uses_the_cache_otherwise_than_torch_is_refused(exported, checkpoint):
    right = load_checkpoint(checkpoint).predictor
    assert isinstance(right, CausalPredictor)
    wrong = Wrong(right.shape, right.settings).eval()
    wrong.load_state_dict(right.state_dict())
    check_parity(right, exported, exact=True)
    with pytest.raises(ValueError, match="differs from torch"):
        check_parity(wrong, exported, exact=True)


@pytest.mark.parametrize("kind", ["missing", "text", "foreign", "damaged"])
def test_a_bad_checkpoint_is_one_line_and_the_old_file_stays(checkpoint, tmp_path, capsys, kind):
    bad, out = tmp_path / "bad.ckpt", tmp_path / "predictor.onnx"
    out.write_bytes(b"the old file")
    if kind == "text":
        bad.write_text("hello")
    elif kind == "foreign":
        torch.save({"state_dict": {}}, bad)
    elif kind == "damaged":
        bad.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(SystemExit) as stop:
        main(str(bad), str(out))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("export: error:") and "bad.ckpt" in said and said.count("\n") == 1
    assert out.read_bytes() == b"the old file"
    assert sorted(path.name for path in tmp_path.iterdir() if path != bad) == ["predictor.onnx"]


@pytest.mark.usefixtures("quick")
def test_a_failed_check_leaves_the_old_file(checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "predictor.onnx"
    out.write_bytes(b"the old file")
    monkeypatch.setattr("predictor.file.parity.MAX_ERROR", 0.0)
    with pytest.raises(SystemExit):
        main(str(checkpoint), str(out))
    assert "nothing written" in capsys.readouterr().err
    assert out.read_bytes() == b"the old file" and len(list(tmp_path.iterdir())) == 1


def test_a_file_says_nothing_about_the_machine_that_wrote_it(exported: Path) -> None:
    """The exporter notes the path of the source behind every node; those are taken out."""
    content = exported.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b"causal.py" not in content and b"attention.py" not in content


def test_two_exports_cannot_write_one_file(checkpoint: Path, tmp_path: Path) -> None:
    with OutputLock(tmp_path / "p.onnx"), pytest.raises(SystemExit) as stopped:
        main(str(checkpoint), str(tmp_path / "p.onnx"))
    assert stopped.value.code == 2
    assert not (tmp_path / "p.onnx").exists()
