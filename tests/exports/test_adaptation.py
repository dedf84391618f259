"""`expertflow adapt`: it writes a file that became better, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import exports
import runtime
from exports.adaptation.__main__ import main
from exports.adaptation.hit_rates import RESIDENCY
from exports.adaptation.settings import AdaptSettings
from predictor.adaptation import candidate, fine_tuning
from routing.cli import run
from routing.predictor_file.reader import open_predictor
from tests.helpers.predicting import TOPOLOGY, write_trace
from tests.helpers.starting import int8_start, start_file

SHIPPED_MODEL = Path(exports.__file__).parent / "moe-8x32"
PREDICTORS = Path(exports.__file__).parent / "predictors"
RULES = {"lru", "lfu", "class-lru", "lfru", "reuse", "belady"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_file(tmp_path_factory.mktemp("start") / "predictor.onnx")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace") / "recorded", num_documents=40)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 40)
    monkeypatch.setattr(fine_tuning, "ROW_TOKENS", 32)


def adapt(*words: str | Path, learning_rate: float = 0.02) -> None:
    rate = f"--learning_rate={learning_rate}"
    run(main, AdaptSettings, [*map(str, words), rate], prog="adapt")


def description(path: Path) -> dict[str, Any]:
    entries = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return dict(json.loads(entries["expertflow"]))


def test_what_became_better_is_written_and_reported_before_and_after(
    start: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_trace(tmp_path / "old", num_documents=30, seed=5)
    out, figures = tmp_path / "new" / "adapted.onnx", tmp_path / "figures" / "adapted.json"
    adapt("--trace", trace, "--predictor", start, "--replay", old, "--out", out, "--json", figures)
    said, report = capsys.readouterr().out, json.loads(figures.read_text())
    assert open_predictor(out).topology == TOPOLOGY
    assert f"wrote {out}: the held-out loss fell" in said and "predicted, after" in said
    assert report["better"] and report["steps"] >= 40
    for text in ("new", "old"):
        assert report["hit_rates"][text].keys() == RULES | {"before", "after"}
        assert all(len(rates) == len(RESIDENCY) for rates in report["hit_rates"][text].values())
        assert report["after"][text]["loss"] < report["before"][text]["loss"]
    for figure in ("this_recall", "next_recall", "this_calibration_error"):
        assert {figure} <= report["before"]["new"].keys() & report["after"]["new"].keys()
    assert [path.name for path in out.parent.glob("[!.]*")] == ["adapted.onnx"]


def test_the_file_says_what_it_was_adapted_to(start: Path, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapted.onnx"
    adapt("--trace", trace, "--predictor", start, "--out", out)
    adapt("--trace", trace, "--predictor", out, "--out", tmp_path / "again.onnx", "--seed=3")
    provenance = description(tmp_path / "again.onnx")["provenance"]
    assert provenance["traces"] == [{"seed": 7}]
    assert [note["traces"] for note in provenance["adaptations"]] == [[{"seed": 0}]] * 2
    before, after = description(start), description(out)
    assert before["calibration"] != after["calibration"]
    assert set(after["metrics"]) >= {"this_known", "next_known"}


def test_what_became_no_better_is_refused_and_the_old_file_stays(
    start: Path,
    trace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(candidate, "recalibrate", lambda *_: None)
    out = tmp_path / "adapted.onnx"
    out.write_bytes(b"precious")
    with pytest.raises(SystemExit) as stop:
        adapt("--trace", trace, "--predictor", start, "--out", out, learning_rate=50.0)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and out.read_bytes() == b"precious"
    assert "adapting brought nothing" in said and f"{out} is not written" in said
    assert list(tmp_path.glob(".adapt-*")) == []


def test_an_int8_file_is_adapted_to_an_int8_file(start: Path, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapted.onnx"
    adapt("--trace", trace, "--predictor", int8_start(start), "--out", out)
    assert description(out)["quantization"] == "int8"


def test_a_trace_of_another_model_is_refused(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = PREDICTORS / "moe-8x32.onnx"
    with pytest.raises(SystemExit):
        adapt("--trace", trace, "--predictor", shipped, "--out", tmp_path / "adapted.onnx")
    assert f"the predictor {shipped} is for" in capsys.readouterr().err


def test_without_a_shipped_predictor_one_must_be_named(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        adapt("--trace", trace, "--out", tmp_path / "adapted.onnx")
    said = capsys.readouterr().err
    assert "no predictor ships for the model" in said and "--predictor" in said


def test_what_the_runtime_recorded_adapts_the_predictor_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 10)
    model = runtime.load(
        SHIPPED_MODEL, PREDICTORS / "moe-8x32.onnx", memory=0.25, record=tmp_path / "recorded"
    )
    with torch.no_grad():
        for first in range(5):
            model(torch.arange(40)[None] * 7 + 100 * first)
    model.expertflow.close()
    out = tmp_path / "adapted.onnx"
    adapt(
        "--trace", tmp_path / "recorded", "--out", out, "--simulated_tokens=20", learning_rate=1e-3
    )
    said = capsys.readouterr().out
    assert f"adapting {PREDICTORS / 'moe-8x32.onnx'}" in said and f"wrote {out}" in said
    runtime.load(SHIPPED_MODEL, out, memory=0.25)
