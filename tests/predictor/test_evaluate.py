"""predictor.evaluate: exported files and baselines in one table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from predictor.evaluate import evaluate
from predictor.evaluation.settings import EvaluateSettings
from predictor.file.documents import (
    CachedPredictor,
    StatelessPredictor,
    open_exported,
    whole_document,
)
from predictor.file.exporter import write_graph
from predictor.networks.interface import RoutePredictor
from predictor.networks.t5 import T5Settings
from predictor.networks.windows import Windows
from predictor.training.checkpoint import Trained
from predictor.training.curves import plot_curves
from predictor.training.metrics import route_metrics
from routing.cli import run
from routing.predictor_file.format import HEADS
from tests.helpers.onnx_predictor import write_predictor
from tests.helpers.predicting import TOPOLOGY, random_document, shape, tiny_predictor, write_trace

WINDOW, HORIZON = 6, 3
T5 = T5Settings(width=16, mlp_width=32, blocks=1, attention_heads=2, head_width=8)


def exported(path: Path, predictor: RoutePredictor) -> Path:
    write_graph(Trained(predictor, TOPOLOGY, "decoder", {}, {}, {}), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def trace(folder: Path) -> Path:
    return write_trace(folder / "trace", num_documents=60, seed=1)


@pytest.fixture(scope="module")
def causal(folder: Path) -> Path:
    torch.manual_seed(3)
    predictor = tiny_predictor(window=WINDOW)
    return exported(folder / "causal.onnx", predictor)


@pytest.fixture(scope="module")
def t5(folder: Path) -> Path:
    torch.manual_seed(4)
    predictor = T5.build(shape(window=WINDOW, horizon=HORIZON)).eval()
    return exported(folder / "t5.onnx", predictor)


def document(length: int, prompt: int = 0) -> Windows:
    made = random_document(np.random.default_rng(length), length)
    return whole_document(made.token_ids_T, made.experts_TLK.astype(np.int16), prompt)


def fails(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(evaluate, EvaluateSettings, list(options), prog="evaluate")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, f"one line, not {message!r}"
    return message


@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
def test_a_document_read_in_chunks_through_a_ring_buffer_equals_one_pass(causal, length) -> None:
    torch.manual_seed(3)
    graph, batch = open_exported(causal), document(length)
    assert isinstance(graph, CachedPredictor)
    expected = tiny_predictor(window=WINDOW)(batch)
    for got, want in zip(graph(batch), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("length", "prompt"), [(1, 0), (5, 2), (6, 0), (7, 9), (23, 4)])
def test_a_predictor_without_a_cache_predicts_each_token_once_and_in_order(
    t5, length, prompt
) -> None:
    torch.manual_seed(4)
    predictor = T5.build(shape(window=WINDOW, horizon=HORIZON)).eval()
    graph, batch = open_exported(t5), document(length, prompt)
    assert isinstance(graph, StatelessPredictor)
    got = graph(batch).this_BTLE[0]
    assert len(got) == length
    ids_T, positions_T = batch.token_ids_BT[0], batch.positions_BT[0]
    last = (length - WINDOW - 1) // (WINDOW // 2) if length > WINDOW else -1
    start = WINDOW + last * (WINDOW // 2) if last >= 0 else 0  # first token of the last run
    context = slice(start - WINDOW // 2 if last >= 0 else 0, None)
    num_prompt = torch.tensor([WINDOW // 2 if last >= 0 else graph.first_generated(batch)])
    want = predictor.predict(ids_T[None, context], positions_T[None, context], num_prompt)
    torch.testing.assert_close(
        got[start:], want.this_BTLE[0, start - context.start :], atol=1e-4, rtol=1e-4
    )


def test_every_figure_lands_in_the_json_and_in_the_picture(trace, causal, t5, folder) -> None:
    out, png = folder / "new" / "figures.json", folder / "new" / "layers.png"
    evaluate(EvaluateSettings(trace=trace, predictors=[causal, t5], json=out, plot=png))
    report = json.loads(out.read_text())
    rows = {(row["name"], row["history"]): row["heads"] for row in report["predictors"]}
    assert list(rows) == [
        ("static frequency", "unused"),
        ("previous token", "known"),
        ("token-id table", "unused"),
        ("causal.onnx", "known"),
        ("causal.onnx", "unknown"),
        ("t5.onnx", "unused"),
    ]
    for heads in rows.values():
        assert set(heads) == set(HEADS)
        for figures in heads.values():
            for figure in figures.values():
                assert len(figure["layers"]) == 3
                assert figure["mean"] == pytest.approx(np.mean(figure["layers"]))
    assert rows["causal.onnx", "known"] != rows["causal.onnx", "unknown"]
    # the trace's first layer routes by the token and its third by the document
    assert rows["token-id table", "unused"]["this"]["recall"]["layers"][0] > 0.98
    assert rows["previous token", "known"]["this"]["recall"]["layers"][2] > 0.8
    assert [file["bytes"] for file in report["files"]] == [f.stat().st_size for f in (causal, t5)]
    assert all(0 < file["step_seconds"] < 1 for file in report["files"])
    assert png.read_bytes().startswith(b"\x89PNG")


def test_figures_are_those_of_the_torch_model_on_the_held_out_documents(
    trace, causal, folder
) -> None:
    held_out, out = write_trace(folder / "other", num_documents=9, seed=5), folder / "o.json"
    evaluate(EvaluateSettings(trace=held_out, fit_trace=trace, predictors=[causal], json=out))
    report = json.loads(out.read_text())
    torch.manual_seed(3)
    predictor, metrics = tiny_predictor(window=WINDOW), route_metrics(TOPOLOGY.stack())
    generator, num_tokens = np.random.default_rng(5), 0
    for _ in range(9):
        made = random_document(generator, int(generator.integers(1, 80)))
        batch = whole_document(made.token_ids_T, made.experts_TLK.astype(np.int16), 0)
        metrics.update(predictor(batch).this_BTLE[0], batch.experts_BTLK[0])
        num_tokens += len(made.token_ids_T)
    assert report["tokens"] == num_tokens
    this = next(r for r in report["predictors"] if r["name"] == "causal.onnx")["heads"]["this"]
    for name, value_L in metrics.compute().items():
        assert this[name]["layers"] == pytest.approx(value_L.tolist(), abs=2e-3)


def test_beside_an_encoder_decoder_every_predictor_is_scored_on_generated_tokens(
    folder, trace, causal, t5, capsys
) -> None:
    held_out = write_trace(folder / "third", num_documents=7, seed=6)
    generator, first_tokens = np.random.default_rng(6), []
    for _ in range(7):
        length = int(generator.integers(1, 80))
        random_document_length = len(random_document(generator, length).token_ids_T)
        first_tokens.append(min(random_document_length, WINDOW) // 2)
    tokens = {}
    for name, files in (("alone", [causal]), ("both", [causal, t5])):
        out = folder / f"{name}.json"
        evaluate(EvaluateSettings(trace=held_out, fit_trace=trace, predictors=files, json=out))
        tokens[name] = json.loads(out.read_text())["tokens"]
    assert tokens["alone"] - tokens["both"] == sum(first_tokens)


def test_a_table_is_printed_for_each_head(trace, causal, capsys) -> None:
    evaluate(EvaluateSettings(trace=trace, predictors=[causal]))
    text = capsys.readouterr().out
    for words in ("this token", "next token", "next 3 tokens", "recall@2", "recall@3", "causal"):
        assert words in text


def test_a_predictor_of_another_model_is_refused(trace, folder, capsys) -> None:
    other = write_predictor(folder / "other.onnx", replace(TOPOLOGY, model="f" * 16))
    message = fails(capsys, f"--trace={trace}", "--predictors", str(other))
    assert "other.onnx" in message
    assert str(trace) in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"not a graph", "is not a readable ONNX file"),
        ({"metadata": "{}"}, "has damaged predictor metadata"),
        ({"without": ["horizon"]}, "lacks the predictor inputs or outputs ['horizon']"),
    ],
)
def test_a_file_that_is_not_a_predictor_is_refused(
    trace, tmp_path, capsys, content, complaint
) -> None:
    path = tmp_path / "bad.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_predictor(path, TOPOLOGY, **content)
    message = fails(capsys, f"--trace={trace}", "--predictors", str(path))
    assert str(path) in message
    assert complaint in message


def test_predictors_with_different_horizons_are_not_compared(trace, folder, capsys) -> None:
    two = [write_predictor(folder / f"h{h}.onnx", TOPOLOGY, horizon=h) for h in (2, 5)]
    message = fails(capsys, f"--trace={trace}", "--predictors", *map(str, two))
    assert "h5.onnx looks 5 tokens ahead" in message


def test_a_missing_predictor_or_trace_is_named(trace, tmp_path, capsys) -> None:
    message = fails(capsys, f"--trace={trace}", "--predictors", str(tmp_path / "none.onnx"))
    assert "there is no predictor" in message
    assert "is not a trace" in fails(capsys, f"--trace={tmp_path}")


def test_a_trace_too_small_to_split_asks_for_another_one(tmp_path, capsys) -> None:
    small = write_trace(tmp_path / "small", num_documents=1)
    assert "--fit_trace" in fails(capsys, f"--trace={small}")


def test_learning_curves_are_drawn_from_a_metrics_file(tmp_path) -> None:
    columns = ["step", *(f"train/{h}_loss" for h in HEADS), *(f"val/{h}_loss" for h in HEADS)]
    columns += [f"val/{h}_{k}_recall" for h in HEADS for k in ("known", "unknown")]
    rows = [[step, *(math.exp(-step / 9) for _ in columns[1:])] for step in range(20)]
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
