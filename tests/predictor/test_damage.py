"""Damaged and diverged predictors are refused by name, never used as if they were whole."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from predictor.evaluation.settings import EvaluateSettings
from predictor.export import ExportSettings, export
from predictor.file.parity import _distance
from predictor.training.checkpoint import load_checkpoint
from predictor.training.metrics import RouteCalibrationError, RouteRecall
from routing.predictor_file.reader import open_predictor
from tests.helpers.predicting import TOPOLOGY, shape, tiny_predictor, train, write_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace") / "rules", num_documents=150)


@pytest.fixture(scope="module")
def checkpoint(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(trace, tmp_path_factory.mktemp("run"), "--trainer.max_epochs=1")


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    out = checkpoint.with_name("predictor.onnx")
    export(ExportSettings(checkpoint=checkpoint, out=out))
    return out


def flipped(path: Path, into: Path, place: int, bit: int) -> Path:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    into.write_bytes(data)
    return into


def weights(checkpoint: Path) -> list[bytes]:
    return [
        w.numpy().tobytes() for w in load_checkpoint(checkpoint).predictor.state_dict().values()
    ]


def test_no_flipped_bit_of_a_checkpoint_changes_a_weight(checkpoint: Path, tmp_path: Path) -> None:
    whole, random, refused = weights(checkpoint), Random(0), 0
    size = checkpoint.stat().st_size
    for _ in range(60):
        damaged = flipped(
            checkpoint, tmp_path / "x.ckpt", random.randrange(size), random.randrange(8)
        )
        try:
            assert weights(damaged) == whole
        except ValueError as error:
            refused += "x.ckpt" in str(error)
    assert refused > 30


def test_every_flipped_bit_of_an_exported_file_is_noticed(exported: Path, tmp_path: Path) -> None:
    random, size = Random(0), exported.stat().st_size
    assert open_predictor(exported).topology == TOPOLOGY
    for _ in range(60):
        damaged = flipped(
            exported, tmp_path / "x.onnx", random.randrange(size), random.randrange(8)
        )
        with pytest.raises(ValueError, match=r"x\.onnx"):
            open_predictor(damaged)


def test_a_quantised_file_has_a_checksum_too(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    export(ExportSettings(checkpoint=checkpoint, out=out, int8=True))
    open_predictor(out)
    with pytest.raises(ValueError, match="does not match its checksum"):
        open_predictor(flipped(out, out, out.stat().st_size // 2, 0))


def with_nan(exported: Path, into: Path) -> Path:
    """The file with every weight NaN, and without a checksum."""
    model = onnx.load(exported)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            new = onnx.numpy_helper.from_array(np.full_like(values, np.nan), tensor.name)
            tensor.CopyFrom(new)
    kept = [entry for entry in model.metadata_props if entry.key == "expertflow"]
    onnx.helper.set_model_props(model, {entry.key: entry.value for entry in kept})
    onnx.save(model, into)
    return into


def test_a_file_that_predicts_nan_is_refused_when_it_is_opened(
    exported: Path, trace: Path, tmp_path: Path
) -> None:
    from predictor.evaluate import evaluate

    bad = with_nan(exported, tmp_path / "nan.onnx")
    with pytest.raises(ValueError, match=r"nan\.onnx predicts NaN"):
        open_predictor(bad)
    with pytest.raises(ValueError, match=r"nan\.onnx predicts NaN"):
        evaluate(EvaluateSettings(trace=trace, predictors=[bad]))


@pytest.mark.parametrize("metric", [RouteRecall, RouteCalibrationError])
def test_a_metric_refuses_nan(metric: Any) -> None:
    measure = metric(TOPOLOGY.stack())
    logits = torch.zeros(2, 3, 8)
    logits[1, 2, 5] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        measure.update(logits, torch.zeros(2, 3, 2, dtype=torch.int64))


def test_parity_does_not_pass_nan() -> None:
    predictor, valid = tiny_predictor(), torch.ones(1, 1, dtype=torch.bool)
    good = torch.zeros(1, 1, shape().num_layers, 8)
    error, _ = _distance(predictor, [good], [np.full(good.shape, np.nan, np.float32)], valid)
    assert not error <= 1


def test_a_checkpoint_with_nan_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.full_like(content["state_dict"][name], float("nan"))
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="weights that are not finite"):
        load_checkpoint(tmp_path / "x.ckpt")


def test_a_training_that_diverges_says_so_in_one_line(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from predictor.training import losses, module

    original = losses.total_loss
    calls = iter(range(10**6))
    monkeypatch.setattr(
        module, "total_loss", lambda losses: original(losses) * (1 if next(calls) < 60 else np.nan)
    )
    with pytest.raises(SystemExit) as stop:
        train(trace, tmp_path, "--trainer.max_epochs=9")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "the training diverged" in said and "best checkpoint" in said
    assert "Traceback" not in said and list(tmp_path.rglob("last.ckpt"))
